"""An adapter in host memory, in the layout of the device's pages: transposed, padded, scale folded into B."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loaders.adapter import AdapterWeights, ExpertLora, LoraPair
from loaders.errors import AdapterError
from runtime.adapters.page_pool import HostPages
from runtime.adapters.replacement_experts import LayerReplacement
from runtime.ops.base import Ops

# Ranks are padded to multiples of this at least: strides of grouped products must be multiples of 16 bytes.
RANK_MULTIPLE = 8

_BITS = {2: torch.int16, 4: torch.int32}

NewPages = Callable[[tuple[int, ...], torch.dtype], Tensor]


def new_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of this process, with whatever bytes are in it."""
    return torch.empty(shape, dtype=dtype)


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

    def new_a(self, shape_PKR: tuple[int, int, int], dtype: torch.dtype, allocate: NewPages) -> tuple[Tensor, Tensor]:
        """Memory as it is stored, and its view [P, K, R]."""
        count, num_in, rank = shape_PKR
        if self.a_rows_first:
            stored = allocate((count, rank, num_in), dtype)
            return stored, stored.transpose(1, 2)
        stored = allocate(shape_PKR, dtype)
        return stored, stored


@dataclass(frozen=True)
class SharedOuterPages:
    """A layer of which the outer factors are one for all experts, of one padded rank.

    `outer`: one page with a13 [1, H, 2R] (gate, then up) and b2 [1, R, H]. `inner`: a page for each expert with b_gate
    and b_up [n, R, I] and a2 [n, I, R].
    """

    outer: HostPages
    inner: HostPages

    def expanded(self) -> HostPages:
        """As pages that have all factors for each expert; the outer ones are views."""
        count = len(self.inner.regions)
        outer = {name: tensor.expand(count, -1, -1) for name, tensor in self.outer.factors.items()}
        return HostPages(
            self.inner.lora_rank, self.inner.regions, {**outer, **self.inner.factors}, self.inner.a_rows_first
        )


@dataclass(frozen=True)
class HostAdapter:
    """Pages per linear module, and per MoE layer one HostPages for each padded rank in use, or shared outer factors.

    An ESFT adapter has none of these, but `replaced` experts by layer.
    """

    linears: Mapping[str, HostPages]
    experts: Mapping[int, list[HostPages]]
    shared_outer: Mapping[int, SharedOuterPages] = field(default_factory=dict)
    replaced: Mapping[int, LayerReplacement] = field(default_factory=dict)

    def all_pages(self) -> list[HostPages]:
        """Of all modules and layers."""
        shared = [pages for layer in self.shared_outer.values() for pages in (layer.outer, layer.inner)]
        return [*self.linears.values(), *(pages for layer in self.experts.values() for pages in layer), *shared]

    @property
    def num_bytes(self) -> int:
        """Bytes that this adapter takes on the device."""
        return sum(pages.num_bytes for pages in self.all_pages()) + self.replaced_bytes

    @property
    def replaced_bytes(self) -> int:
        """Bytes of the experts that it replaces."""
        return sum(replacement.num_bytes for replacement in self.replaced.values())

    @property
    def experts_of_layers(self) -> dict[int, int]:
        """How many experts of each layer it adapts or replaces."""
        counts = {layer: sum(len(pages.regions) for pages in by_rank) for layer, by_rank in self.experts.items()}
        counts |= {layer: len(own.inner.regions) for layer, own in self.shared_outer.items()}
        counts |= {layer: len(replacement.experts) for layer, replacement in self.replaced.items()}
        return dict(sorted(counts.items()))

    @property
    def num_expert_pages(self) -> int:
        """Number of (layer, expert) pairs that it adapts or replaces."""
        return sum(self.experts_of_layers.values())

    def expanded(self) -> HostAdapter:
        """The same adapter with all factors for each expert; those that are shared are views."""
        experts = {**self.experts, **{layer: [own.expanded()] for layer, own in self.shared_outer.items()}}
        return replace(self, experts=dict(sorted(experts.items())), shared_outer={})


def to_host_adapter(
    weights: AdapterWeights,
    dtype: torch.dtype,
    layout: FactorLayout = FactorLayout(),
    allocate: NewPages = new_pages,
) -> HostAdapter:
    """Convert a checked adapter file; B x scale is computed in float32 before it is rounded to `dtype`.

    `allocate` gives memory for the pages, and all of it is written. Raises AdapterError if a factor is not finite then.
    """
    linears = {name: _linear_pages(pair, dtype, layout, allocate) for name, pair in weights.linears.items()}
    experts, shared_outer = {}, {}
    for layer, by_expert in weights.experts.items():
        if _has_shared_outer_factors(by_expert):
            shared_outer[layer] = _shared_outer_pages(by_expert, dtype, layout, allocate)
            continue
        by_rank: dict[int, dict[int, ExpertLora]] = {}
        for index, expert in sorted(by_expert.items()):
            by_rank.setdefault(layout.padded_rank(_rank(expert)), {})[index] = expert
        experts[layer] = [
            _expert_pages(rank, group, dtype, layout, allocate) for rank, group in sorted(by_rank.items())
        ]
    shared = {layer: [own.outer, own.inner] for layer, own in shared_outer.items()}
    rounded_layers = {
        layer: pages
        for layer, pages in {**experts, **shared}.items()
        if any(
            _is_rounded(expert.gate, dtype) or _is_rounded(expert.up, dtype) or _is_rounded(expert.down, dtype)
            for expert in weights.experts[layer].values()
        )
    }
    require_finite(
        {name: pages for name, pages in linears.items() if _is_rounded(weights.linears[name], dtype)}, rounded_layers
    )
    return HostAdapter(linears, experts, shared_outer)


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


def _is_rounded(pair: LoraPair | None, dtype: torch.dtype) -> bool:
    """Whether other numbers come into its page than are in the file, which are finite."""
    return pair is not None and (pair.scale != 1.0 or pair.a.dtype != dtype or pair.b.dtype != dtype)


def _dtype_name(pages: HostPages) -> str:
    return str(next(iter(pages.factors.values())).dtype).removeprefix("torch.")


def _ends(factor: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(factor)
    return float(low), float(high)


def _linear_pages(pair: LoraPair, dtype: torch.dtype, layout: FactorLayout, allocate: NewPages) -> HostPages:
    rank = layout.padded_rank(pair.lora_rank)
    stored_a, a_PKR = layout.new_a((1, pair.a.shape[1], rank), dtype, allocate)
    b_PRN = allocate((1, rank, pair.b.shape[0]), dtype)
    _write_pairs([pair], a_PKR, b_PRN)
    return HostPages(rank, [0], {"a": stored_a, "b": b_PRN}, layout.a_rows_first)


def _expert_pages(
    rank: int,
    experts: Mapping[int, ExpertLora],
    dtype: torch.dtype,
    layout: FactorLayout,
    allocate: NewPages = new_pages,
) -> HostPages:
    """Factors: a13 [n, H, 2R] (gate, then up), b_gate and b_up [n, R, I], a2 [n, I, R], b2 [n, R, H]."""
    hidden, width = _expert_widths(experts)
    count = len(experts)
    stored_a13, a13 = layout.new_a((count, hidden, 2 * rank), dtype, allocate)
    stored_a2, a2 = layout.new_a((count, width, rank), dtype, allocate)
    columns = {"b_gate": width, "b_up": width, "b2": hidden}
    bs = {name: allocate((count, rank, num_out), dtype) for name, num_out in columns.items()}
    a_gate, a_up = a13.split(rank, dim=2)
    _write_pairs([expert.gate for expert in experts.values()], a_gate, bs["b_gate"])
    _write_pairs([expert.up for expert in experts.values()], a_up, bs["b_up"])
    _write_pairs([expert.down for expert in experts.values()], a2, bs["b2"])
    return HostPages(rank, list(experts), {"a13": stored_a13, "a2": stored_a2, **bs}, layout.a_rows_first)


def _write_pairs(pairs: Sequence[LoraPair | None], a_PKR: Tensor, b_PRN: Tensor) -> None:
    """Write every page: its pair, and zeros where it has none or a lower rank. Pairs of one rank and scale together."""
    alike: dict[tuple[int, float, torch.dtype, torch.dtype] | None, list[int]] = {}
    for page, pair in enumerate(pairs):
        kind = None if pair is None else (pair.lora_rank, pair.scale, pair.a.dtype, pair.b.dtype)
        alike.setdefault(kind, []).append(page)
    for kind, pages in alike.items():
        rank, scale, _, b_dtype = kind or (0, 1.0, a_PKR.dtype, b_PRN.dtype)
        if rank < b_PRN.shape[1]:
            a_PKR[pages, :, rank:] = 0
            b_PRN[pages, rank:] = 0
        chosen = [pair for page in pages if (pair := pairs[page]) is not None]
        if not chosen:
            continue
        a_PRK = torch.stack([pair.a for pair in chosen]).to(a_PKR.dtype)
        b_PNR = torch.stack([pair.b for pair in chosen])
        if b_dtype != b_PRN.dtype:
            b_PNR = b_PNR.float()  # else PyTorch multiplies in float32 without a copy of that size
        if scale != 1.0:
            b_PNR.mul_(scale)
        _copy_transposed(a_PKR[:, :, :rank], pages, a_PRK)
        _copy_transposed(b_PRN[:, :rank], pages, b_PNR.to(b_PRN.dtype))


def _copy_transposed(target: Tensor, pages: Sequence[int], source: Tensor) -> None:
    """target[pages] = source, its last two dimensions swapped. NumPy does this three times as fast as PyTorch."""
    bits = _BITS[target.element_size()]
    where = slice(pages[0], pages[-1] + 1) if len(pages) == pages[-1] - pages[0] + 1 else pages
    target.view(bits).numpy()[where] = source.view(bits).numpy().swapaxes(1, 2)


def _has_shared_outer_factors(experts: Mapping[int, ExpertLora]) -> bool:
    """Whether A of gate and up and B of down, with its scale, are each one tensor for all experts that have them."""

    def is_one(outer: Iterable[tuple[Tensor, float] | None]) -> bool:
        return len({(id(found[0]), found[1]) if found else None for found in outer} - {None}) <= 1

    pairs = [(expert.gate, expert.up, expert.down) for expert in experts.values()]
    if not all(
        (gate is None or gate.a_is_shared) and (up is None or up.a_is_shared) and (down is None or down.b_is_shared)
        for gate, up, down in pairs
    ):
        return False
    gates, ups, downs = zip(*pairs, strict=True)
    is_one_a = all(is_one((pair.a, 1.0) if pair else None for pair in side) for side in (gates, ups))
    return is_one_a and is_one((pair.b, pair.scale) if pair else None for pair in downs)


def _shared_outer_pages(
    by_expert: Mapping[int, ExpertLora], dtype: torch.dtype, layout: FactorLayout, allocate: NewPages
) -> SharedOuterPages:
    experts = dict(sorted(by_expert.items()))
    count, rank = len(experts), layout.padded_rank(max(map(_rank, experts.values())))
    hidden, width = _expert_widths(experts)
    stored_a13, a13_1KR = layout.new_a((1, hidden, 2 * rank), dtype, allocate)
    stored_a2, a2_PKR = layout.new_a((count, width, rank), dtype, allocate)
    b2_1RN = allocate((1, rank, hidden), dtype)
    bs_PRN = {name: allocate((count, rank, width), dtype) for name in ("b_gate", "b_up")}
    sides = [[expert.gate for expert in experts.values()], [expert.up for expert in experts.values()]]
    for pairs, a_1KR, b_PRN in zip(sides, a13_1KR.split(rank, dim=2), bs_PRN.values(), strict=True):
        _write_a(_any_of(pairs), a_1KR[0])
        for page, pair in enumerate(pairs):
            _write_b(pair, b_PRN[page])
    downs = [expert.down for expert in experts.values()]
    for page, pair in enumerate(downs):
        _write_a(pair, a2_PKR[page])
    _write_b(_any_of(downs), b2_1RN[0])
    outer = HostPages(rank, [0], {"a13": stored_a13, "b2": b2_1RN}, layout.a_rows_first)
    return SharedOuterPages(outer, HostPages(rank, list(experts), {"a2": stored_a2, **bs_PRN}, layout.a_rows_first))


def _any_of(pairs: Sequence[LoraPair | None]) -> LoraPair | None:
    """One of them, for what all of them share."""
    return next((pair for pair in pairs if pair is not None), None)


def _write_a(pair: LoraPair | None, a_KR: Tensor) -> None:
    rank = 0 if pair is None else pair.lora_rank
    a_KR[:, rank:] = 0
    if pair is not None:
        a_KR[:, :rank] = pair.a.T


def _write_b(pair: LoraPair | None, b_RN: Tensor) -> None:
    rank = 0 if pair is None else pair.lora_rank
    b_RN[rank:] = 0
    if pair is not None:
        b_RN[:rank] = (pair.b.float() * pair.scale).T


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
