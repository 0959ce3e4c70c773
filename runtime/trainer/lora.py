"""LoRA layers over the base's own: linears under tensor parallelism, and routed experts.

Shape suffixes: T tokens, K input and N output width on this process, R LoRA rank, E local experts, G adapted ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from runtime.distributed.mesh import Group
from runtime.layers.linear import Linear
from runtime.layers.placement import Placement
from runtime.ops.frozen_groups import PlainGroups
from runtime.trainer.dropout import Dropout
from runtime.trainer.expert_function import BaseExperts, ExpertFactors, routed_experts
from runtime.trainer.expert_rows import ExpertRows
from runtime.trainer.parameters import LoraParameter, Side


class Split(Enum):
    """How a linear's weight [out, in] is spread over tp: not at all, by output, or by input."""

    NONE = None
    COLUMN = 0
    ROW = 1


@dataclass(frozen=True)
class LoraSpec:
    """Rank, scale (alpha / rank, or alpha / sqrt(rank)) and dropout of one module."""

    rank: int
    scale: float
    dropout: Dropout | None = None


class LoraParallelLinear(nn.Module):
    """y = x W^T + scale (x A^T) B^T on this process's part of W.

    COLUMN: the caller has entered the parallel region with x. ROW: the result is a partial sum that the caller joins.
    """

    def __init__(
        self, name: str, shape: tuple[int, int], split: Split, placement: Placement, tp: Group, spec: LoraSpec | None
    ) -> None:
        super().__init__()
        out_features, in_features = shape
        self.name, self.shape, self.split, self.spec = name, shape, split, spec
        self.local_in = in_features // tp.size if split is Split.ROW else in_features
        self.local_out = out_features // tp.size if split is Split.COLUMN else out_features
        self.first_column = self.local_in * tp.rank if split is Split.ROW else 0
        self.base = Linear(name, self.local_in, self.local_out, placement)
        if spec is not None:
            self.lora_A = _factor(spec.rank, self.local_in, device=placement.device)
            self.lora_B = _factor(self.local_out, spec.rank, device=placement.device)

    def forward(self, x_TK: Tensor, ids_T: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]; `ids_T` are the tokens' places in the run, for dropout."""
        y_TN: Tensor = self.base(x_TK, None)
        if self.spec is None:
            return y_TN
        inputs = x_TK
        if self.spec.dropout is not None and self.training and ids_T is not None:
            inputs = x_TK * self.spec.dropout.scaled_mask(ids_T, self.local_in, self.first_column, x_TK.dtype)
        shrunk_TR = torch.nn.functional.linear(inputs, self.lora_A.to(x_TK.dtype))
        scaled_B = (self.lora_B * self.spec.scale).to(x_TK.dtype)
        return torch.addmm(y_TN, shrunk_TR, scaled_B.T)

    def lora_parameters(self) -> list[LoraParameter]:
        """A and B as they are declared to initialisation, gradient sums and checkpoints."""
        if self.spec is None:
            return []
        out_features, in_features = self.shape
        column, row = self.split is Split.COLUMN, self.split is Split.ROW
        rank, scale = self.spec.rank, self.spec.scale
        return [
            LoraParameter(f"{self.name}.{Side.A}", Side.A, self.lora_A, (rank, in_features), scale,
                          shard_dim=1 if row else None, is_partial=column),
            LoraParameter(f"{self.name}.{Side.B}", Side.B, self.lora_B, (out_features, rank), scale,
                          shard_dim=0 if column else None, is_partial=row),
        ]  # fmt: skip


class LoraGroupedExperts(nn.Module):
    """The routed experts that lie here, and the factors of those among them that are adapted."""

    def __init__(
        self,
        name: str,
        experts: Sequence[int],
        widths: tuple[int, int],
        placement: Placement,
        spec: LoraSpec | None,
    ) -> None:
        """`experts`: their global indices. `widths`: (hidden, expert width). All are adapted if there is a `spec`."""
        super().__init__()
        hidden, width = widths
        self.name, self.experts, self.widths = name, tuple(experts), widths
        self.ops = placement.ops
        self.w13 = placement.empty(len(experts), 2 * width, hidden)
        self.w2 = placement.empty(len(experts), hidden, width)
        self.device = placement.device
        self._first_rows: tuple[Tensor, Tensor] | None = None
        self.base = BaseExperts(PlainGroups(self.w13, self.ops), PlainGroups(self.w2, self.ops), self.ops)
        self.spec: LoraSpec | None = None
        self.adapted: tuple[int, ...] = ()
        self.set_factors(spec, self.experts)

    def pack_base(self) -> None:
        """Once the base is loaded: hold it as the device multiplies by it fastest, which may take twice the memory."""
        self._first_rows = self.first_rows()
        self.base = BaseExperts(self.ops.pack_groups(self.w13), self.ops.pack_groups(self.w2), self.ops)
        del self.w13, self.w2

    def first_rows(self) -> tuple[Tensor, Tensor]:
        """Of each expert's w13 and w2, [E, H] and [E, I], by which bases are told apart."""
        return (self.w13[:, 0].clone(), self.w2[:, 0].clone()) if self._first_rows is None else self._first_rows

    def set_factors(self, spec: LoraSpec | None, adapted: Sequence[int]) -> None:
        """Make room for the factors of those of `adapted` (global indices) that lie here, all zeros."""
        self.spec = spec
        self.adapted = tuple(expert for expert in adapted if expert in self.experts) if spec is not None else ()
        if spec is None:
            return
        count, (hidden, width), device = len(self.adapted), self.widths, self.device
        self.gate_up_A = _factor(count, spec.rank, hidden, device=device)
        self.gate_up_B = _factor(count, 2 * width, spec.rank, device=device)
        self.down_A = _factor(count, spec.rank, width, device=device)
        self.down_B = _factor(count, hidden, spec.rank, device=device)

    @property
    def are_all_adapted(self) -> bool:
        """Whether every expert here has factors."""
        return len(self.adapted) == len(self.experts)

    def forward(self, x_TH: Tensor, gates_M: Tensor, rows: ExpertRows) -> Tensor:
        """See `routed_experts`."""
        return routed_experts(x_TH, gates_M, self.base, self._factors(), rows)

    def _factors(self) -> ExpertFactors | None:
        if self.spec is None or not self.adapted:
            return None
        dropout = self.spec.dropout if self.training else None
        second = None if dropout is None else Dropout(dropout.p, ~dropout.key)
        return ExpertFactors(self.gate_up_A, self.gate_up_B, self.down_A, self.down_B, self.spec.scale,
                             self.spec.scale, dropout, second)  # fmt: skip

    def lora_parameters(self) -> list[LoraParameter]:
        """The four factors; dimension 0 runs over the adapted experts that lie here."""
        if self.spec is None:
            return []
        (hidden, width), rank = self.widths, self.spec.rank
        entries = (
            ("gate_up_proj", Side.A, self.gate_up_A, (rank, hidden)),
            ("gate_up_proj", Side.B, self.gate_up_B, (2 * width, rank)),
            ("down_proj", Side.A, self.down_A, (rank, width)),
            ("down_proj", Side.B, self.down_B, (hidden, rank)),
        )
        scale, adapted = self.spec.scale, self.adapted
        return [
            LoraParameter(f"{self.name}.{projection}.{side}", side, tensor, shape, scale, experts=adapted)
            for projection, side, tensor, shape in entries
        ]


def _factor(*shape: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
