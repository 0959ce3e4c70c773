"""An adapter in host memory, in the layout of the device's pages: transposed, padded, scale folded into B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.adapter import AdapterWeights, ExpertLora, LoraPair
from runtime.adapters.page_pool import HostPages

# Ranks are padded to multiples of this: strides of grouped products must be multiples of 16 bytes.
RANK_MULTIPLE = 8


@dataclass(frozen=True)
class HostAdapter:
    """Pages per linear module, and per MoE layer one HostPages for each padded rank in use."""

    linears: Mapping[str, HostPages]
    experts: Mapping[int, list[HostPages]]

    @property
    def num_bytes(self) -> int:
        """Bytes that this adapter takes on the device."""
        return sum(pages.num_bytes for pages in self.linears.values()) + self.expert_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of its expert pages alone."""
        return sum(pages.num_bytes for layer in self.experts.values() for pages in layer)

    @property
    def num_expert_pages(self) -> int:
        """Number of (layer, expert) pairs that it adapts."""
        return sum(len(pages.regions) for layer in self.experts.values() for pages in layer)


def to_host_adapter(weights: AdapterWeights, dtype: torch.dtype) -> HostAdapter:
    """Convert a checked adapter file; B x scale is computed in float32 before it is rounded to `dtype`."""
    linears = {name: _linear_pages(pair, dtype) for name, pair in weights.linears.items()}
    experts = {}
    for layer, by_expert in weights.experts.items():
        by_rank: dict[int, dict[int, ExpertLora]] = {}
        for index, expert in sorted(by_expert.items()):
            by_rank.setdefault(_padded_rank(expert), {})[index] = expert
        experts[layer] = [_expert_pages(rank, group, dtype) for rank, group in sorted(by_rank.items())]
    return HostAdapter(linears, experts)


def _linear_pages(pair: LoraPair, dtype: torch.dtype) -> HostPages:
    rank = _pad(pair.lora_rank)
    a_KR = torch.zeros(1, pair.a.shape[1], rank, dtype=dtype)
    b_RN = torch.zeros(1, rank, pair.b.shape[0], dtype=dtype)
    _write_pair(pair, a_KR[0], b_RN[0])
    return HostPages(rank, [0], {"a": a_KR, "b": b_RN})


def _expert_pages(rank: int, experts: Mapping[int, ExpertLora], dtype: torch.dtype) -> HostPages:
    """Factors: a13 [n, H, 2R] (gate, then up), b_gate and b_up [n, R, I], a2 [n, I, R], b2 [n, R, H]."""
    hidden, width = _expert_widths(experts)
    count = len(experts)
    shapes = {"a13": (hidden, 2 * rank), "b_gate": (rank, width), "b_up": (rank, width), "a2": (width, rank),
              "b2": (rank, hidden)}  # fmt: skip
    factors = {name: torch.zeros(count, *shape, dtype=dtype) for name, shape in shapes.items()}
    for page, expert in enumerate(experts.values()):
        a_gate, a_up = factors["a13"][page].split(rank, dim=1)
        _write_pair(expert.gate, a_gate, factors["b_gate"][page])
        _write_pair(expert.up, a_up, factors["b_up"][page])
        _write_pair(expert.down, factors["a2"][page], factors["b2"][page])
    return HostPages(rank, list(experts), factors)


def _write_pair(pair: LoraPair | None, a_KR: Tensor, b_RN: Tensor) -> None:
    if pair is not None:
        a_KR[:, : pair.lora_rank] = pair.a.T
        b_RN[: pair.lora_rank] = (pair.b.float() * pair.scale).T


def _expert_widths(experts: Mapping[int, ExpertLora]) -> tuple[int, int]:
    """(hidden, expert width) read off any factor."""
    for expert in experts.values():
        if expert.down is not None:
            return expert.down.b.shape[0], expert.down.a.shape[1]
        pair = expert.gate or expert.up
        if pair is not None:
            return pair.a.shape[1], pair.b.shape[0]
    raise ValueError("no expert has a factor")


def _padded_rank(expert: ExpertLora) -> int:
    return _pad(max(pair.lora_rank for pair in (expert.gate, expert.up, expert.down) if pair is not None))


def _pad(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
