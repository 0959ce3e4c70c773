"""An adapter in host memory, in the layout of the device's pages: transposed, padded, scale folded into B."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.adapter import AdapterWeights, ExpertLora, LoraPair
from loaders.errors import AdapterError
from runtime.adapters.page_pool import HostPages
from runtime.ops.base import Ops

# Ranks are padded to multiples of this at least: strides of grouped products must be multiples of 16 bytes.
RANK_MULTIPLE = 8

_BITS = {2: torch.int16, 4: torch.int32}

NewZeros = Callable[[tuple[int, ...], torch.dtype], Tensor]


def new_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory of this process."""
    return torch.zeros(shape, dtype=dtype)


@dataclass(frozen=True)
class FactorLayout:
    """How a device wants factors: ranks padded to multiples of `rank_multiple`, and A [K, R] or its transpose."""

    rank_multiple: int = RANK_MULTIPLE
    a_rows_first: bool = False

    @classmethod
    def of(cls, ops: Ops) -> FactorLayout:
        """The layout of a back-end."""
        return cls(math.lcm(RANK_MULTIPLE, ops.lora_rank_multiple), ops.lora_a_rows_first)

    def padded_rank(self, rank: int) -> int:
        """The rank that is stored."""
        return -(-rank // self.rank_multiple) * self.rank_multiple

    def new_a(self, shape_PKR: tuple[int, int, int], dtype: torch.dtype, zeros: NewZeros) -> tuple[Tensor, Tensor]:
        """Zeros as they are stored, and their view [P, K, R]."""
        count, num_in, rank = shape_PKR
        if self.a_rows_first:
            stored = zeros((count, rank, num_in), dtype)
            return stored, stored.transpose(1, 2)
        stored = zeros(shape_PKR, dtype)
        return stored, stored


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


def to_host_adapter(
    weights: AdapterWeights,
    dtype: torch.dtype,
    layout: FactorLayout = FactorLayout(),
    zeros: NewZeros = new_zeros,
) -> HostAdapter:
    """Convert a checked adapter file; B x scale is computed in float32 before it is rounded to `dtype`.

    `zeros` gives the memory of the pages. Raises AdapterError if a factor is not finite then.
    """
    linears = {name: _linear_pages(pair, dtype, layout, zeros) for name, pair in weights.linears.items()}
    experts = {}
    for layer, by_expert in weights.experts.items():
        by_rank: dict[int, dict[int, ExpertLora]] = {}
        for index, expert in sorted(by_expert.items()):
            by_rank.setdefault(layout.padded_rank(_rank(expert)), {})[index] = expert
        experts[layer] = [_expert_pages(rank, group, dtype, layout, zeros) for rank, group in sorted(by_rank.items())]
    require_finite(linears, experts)
    return HostAdapter(linears, experts)


def require_finite(linears: Mapping[str, HostPages], experts: Mapping[int, Sequence[HostPages]]) -> None:
    """Devices multiply rows of other requests, as zeros, with these factors: infinity would make them NaN."""
    named = list(linears.items())
    named += [(f"routed experts of layer {layer}", pages) for layer, group in experts.items() for pages in group]
    problems = [
        f"{name}: factors overflow {_dtype_name(pages)} (B is multiplied by the adapter's scale, and a part's weight)"
        for name, pages in named
        if not all(math.isfinite(end) for factor in pages.factors.values() for end in _ends(factor))
    ]
    if problems:
        raise AdapterError(f"adapter refused, {len(problems)} modules overflow", problems)


def _dtype_name(pages: HostPages) -> str:
    return str(next(iter(pages.factors.values())).dtype).removeprefix("torch.")


def _ends(factor: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(factor)
    return float(low), float(high)


def _linear_pages(pair: LoraPair, dtype: torch.dtype, layout: FactorLayout, zeros: NewZeros) -> HostPages:
    rank = layout.padded_rank(pair.lora_rank)
    stored_a, a_PKR = layout.new_a((1, pair.a.shape[1], rank), dtype, zeros)
    b_PRN = zeros((1, rank, pair.b.shape[0]), dtype)
    _write_pairs([pair], a_PKR, b_PRN)
    return HostPages(rank, [0], {"a": stored_a, "b": b_PRN}, layout.a_rows_first)


def _expert_pages(
    rank: int,
    experts: Mapping[int, ExpertLora],
    dtype: torch.dtype,
    layout: FactorLayout,
    zeros: NewZeros = new_zeros,
) -> HostPages:
    """Factors: a13 [n, H, 2R] (gate, then up), b_gate and b_up [n, R, I], a2 [n, I, R], b2 [n, R, H]."""
    hidden, width = _expert_widths(experts)
    count = len(experts)
    stored_a13, a13 = layout.new_a((count, hidden, 2 * rank), dtype, zeros)
    stored_a2, a2 = layout.new_a((count, width, rank), dtype, zeros)
    columns = {"b_gate": width, "b_up": width, "b2": hidden}
    bs = {name: zeros((count, rank, num_out), dtype) for name, num_out in columns.items()}
    a_gate, a_up = a13.split(rank, dim=2)
    _write_pairs([expert.gate for expert in experts.values()], a_gate, bs["b_gate"])
    _write_pairs([expert.up for expert in experts.values()], a_up, bs["b_up"])
    _write_pairs([expert.down for expert in experts.values()], a2, bs["b2"])
    return HostPages(rank, list(experts), {"a13": stored_a13, "a2": stored_a2, **bs}, layout.a_rows_first)


def _write_pairs(pairs: Sequence[LoraPair | None], a_PKR: Tensor, b_PRN: Tensor) -> None:
    """Write the pair of each page, if it has one; pairs of the same rank and scale together."""
    alike: dict[tuple[int, float, torch.dtype, torch.dtype], list[int]] = {}
    for page, pair in enumerate(pairs):
        if pair is not None:
            alike.setdefault((pair.lora_rank, pair.scale, pair.a.dtype, pair.b.dtype), []).append(page)
    for (rank, scale, _, b_dtype), pages in alike.items():
        chosen = [pair for page in pages if (pair := pairs[page]) is not None]
        a_PRK = torch.stack([pair.a for pair in chosen]).to(a_PKR.dtype)
        b_PNR = torch.stack([pair.b for pair in chosen])
        if scale != 1.0 or b_dtype != b_PRN.dtype:
            b_PNR = (b_PNR.float() * scale).to(b_PRN.dtype)
        _copy_transposed(a_PKR[:, :, :rank], pages, a_PRK)
        _copy_transposed(b_PRN[:, :rank], pages, b_PNR)


def _copy_transposed(target: Tensor, pages: Sequence[int], source: Tensor) -> None:
    """target[pages] = source, its last two dimensions swapped. NumPy does this three times as fast as PyTorch."""
    bits = _BITS[target.element_size()]
    where = slice(pages[0], pages[-1] + 1) if len(pages) == pages[-1] - pages[0] + 1 else pages
    target.view(bits).numpy()[where] = source.view(bits).numpy().swapaxes(1, 2)


def _expert_widths(experts: Mapping[int, ExpertLora]) -> tuple[int, int]:
    """(hidden, expert width) read off any factor."""
    for expert in experts.values():
        if expert.down is not None:
            return expert.down.b.shape[0], expert.down.a.shape[1]
        pair = expert.gate or expert.up
        if pair is not None:
            return pair.a.shape[1], pair.b.shape[0]
    raise ValueError("no expert has a factor")


def _rank(expert: ExpertLora) -> int:
    return max(pair.lora_rank for pair in (expert.gate, expert.up, expert.down) if pair is not None)
