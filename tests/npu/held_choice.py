"""Operation tables whose experts are chosen by another run, so that a near tie in the router changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.ops.cpu import CpuOps
from runtime.ops.npu.ops import NpuOps
from runtime.ops.routing import RoutingRule

LayerInput = tuple[Tensor, Tensor | None]  # what the layer before adds, and what it adds to
Choose = Callable[[Tensor, Tensor | None, RoutingRule], tuple[Tensor, Tensor]]
FORCED = 1e4  # outweighs every score


def held(choose: Choose, logits_TE: Tensor, rule: RoutingRule, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """What `choose` gives of its own logits where a bias, which steers the choice alone, forces each token's choice."""
    found = []
    for logits_E, experts_K in zip(logits_TE, experts_TK, strict=True):
        bias_E = torch.zeros_like(logits_E).index_fill_(0, experts_K.long(), FORCED)
        weights_1K, chosen_1K = choose(logits_E[None], bias_E, rule)
        assert set(chosen_1K[0].tolist()) == set(experts_K.tolist())
        found.append((weights_1K, chosen_1K))
    weights, chosen = zip(*found, strict=True)
    return torch.cat(weights), torch.cat(chosen)


class Recorded(CpuOps):
    """The reference, which notes each call's choice; `inputs` holds what each layer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Tensor] = []
        self.inputs: list[LayerInput] = []

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        weights_TK, experts_TK = super().choose_experts(logits_TE, bias_E, rule)
        self.choices.append(experts_TK)
        return weights_TK, experts_TK


class HeldCpu(CpuOps):
    """The CPU back-end with given choices; weights from its own logits."""

    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self.choices = iter(choices)

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        return held(super().choose_experts, logits_TE, rule, next(self.choices))


class HeldNpu(NpuOps):
    """Ascend's operators with given choices; weights by the operator from its own logits."""

    def __init__(self, choices: list[Tensor], *, mla_prolog: bool = True) -> None:
        super().__init__(mla_prolog=mla_prolog)
        self.choices = iter(choices)

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        return held(super().choose_experts, logits_TE, rule, next(self.choices))
