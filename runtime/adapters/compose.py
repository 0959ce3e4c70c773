"""A weighted sum of adapters as one adapter of the joined rank.

w1 B1 A1 + w2 B2 A2 = [w1 B1, w2 B2] [A1; A2]: A is stacked along the rank, the weighted B stand beside each other. This
is done for each module and each expert by itself, so a sum takes exactly the bytes that its parts take: an expert that
only one part adapts has that part's rank. B, which each part holds rounded to the device's type, is multiplied by its
weight in float32 and rounded once more; weights of 1 and -1 round nothing.

A layer of which all parts have the outer factors once for all experts has them once in the sum too: the weight of down
is then in the outer B, those of gate and up in the inner ones. All its experts have the whole joined rank, with zeros
for a part that lacks them; where that would take more bytes than outer factors for each expert, these are stored.

Shape suffixes: P pages of a pool, R rank, N outputs; a factor A is seen as [P, R, sides, inputs].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.errors import AdapterError
from runtime.adapters.host_adapter import HostAdapter, SharedOuterPages, require_finite
from runtime.adapters.page_pool import HostPages


@dataclass(frozen=True)
class _Share:
    """What one part adds to one region: page `page` of `pages`, times `weight`."""

    weight: float
    pages: HostPages
    page: int


def compose(parts: Sequence[tuple[float, HostAdapter]], max_lora_rank: int) -> HostAdapter:
    """The sum of adapters of one back-end, each times its weight.

    Raises AdapterError if a module's joined rank is above `max_lora_rank` or a weighted factor is not finite.
    """
    adapters = [adapter for _, adapter in parts]
    shared_layers = _shared_layers(adapters, max_lora_rank)
    name, rank = max(_joined_ranks(adapters, shared_layers).items(), key=lambda item: item[1], default=("", 0))
    if rank > max_lora_rank:
        raise AdapterError(f"the joined rank is {rank} ({name}), and that of a sum may be {max_lora_rank} at most")
    linears: dict[str, list[_Share]] = {}
    layers: dict[int, dict[int, list[_Share]]] = {}
    for weight, adapter in parts:
        for module, pages in adapter.linears.items():
            linears.setdefault(module, []).append(_Share(weight, pages, 0))
        for layer, by_rank in _own_experts(adapter, shared_layers).items():
            for expert, share in _shares(weight, by_rank).items():
                layers.setdefault(layer, {}).setdefault(expert, []).append(share)
    joined = HostAdapter(
        {module: _join(_rank(shares), {0: shares}) for module, shares in linears.items()},
        {layer: _join_experts(experts) for layer, experts in sorted(layers.items())},
        {layer: _join_shared(layer, parts) for layer in sorted(shared_layers)},
    )
    shared = {layer: [own.outer, own.inner] for layer, own in joined.shared_outer.items()}
    require_finite(joined.linears, {**joined.experts, **shared})
    return joined


def joined_bytes(adapters: Sequence[HostAdapter], max_lora_rank: int) -> int:
    """Bytes that the pages of their sum take, before it is made; no less with more parts."""
    shared_layers = _shared_layers(adapters, max_lora_rank)
    num_bytes = sum(_joined_shared_bytes(_shared_parts(adapters, layer)) for layer in shared_layers)
    for adapter in adapters:
        own = HostAdapter(adapter.linears, _own_experts(adapter, shared_layers))
        num_bytes += own.num_bytes
    return num_bytes


def _shared_layers(adapters: Sequence[HostAdapter], max_lora_rank: int) -> frozenset[int]:
    """Layers that the sum stores with shared outer factors: all parts do, and it takes no more bytes."""
    layers = {layer for adapter in adapters for layer in adapter.shared_outer}
    layers -= {layer for adapter in adapters for layer in adapter.experts}
    return frozenset(layer for layer in layers if _stays_shared(_shared_parts(adapters, layer), max_lora_rank))


def _stays_shared(parts: Sequence[SharedOuterPages], max_lora_rank: int) -> bool:
    """A rank that only shared factors would bring above the limit is no reason to refuse the sum."""
    if sum(own.outer.lora_rank for own in parts) > max_lora_rank:
        return False
    return _joined_shared_bytes(parts) <= sum(own.expanded().num_bytes for own in parts)


def _shared_parts(adapters: Iterable[HostAdapter], layer: int) -> list[SharedOuterPages]:
    return [adapter.shared_outer[layer] for adapter in adapters if layer in adapter.shared_outer]


def _joined_shared_bytes(parts: Sequence[SharedOuterPages]) -> int:
    num_experts = len(_union(parts))
    return sum(own.outer.num_bytes + own.inner.num_bytes // len(own.inner.regions) * num_experts for own in parts)


def _union(parts: Iterable[SharedOuterPages]) -> list[int]:
    """Experts that any of them has."""
    return sorted({expert for own in parts for expert in own.inner.regions})


def _own_experts(adapter: HostAdapter, shared_layers: frozenset[int]) -> dict[int, list[HostPages]]:
    """An adapter's pages of the layers in which the sum has all factors for each expert."""
    return {layer: pages for layer, pages in adapter.expanded().experts.items() if layer not in shared_layers}


def _joined_ranks(adapters: Sequence[HostAdapter], shared_layers: frozenset[int]) -> dict[str, int]:
    """The rank that each module would have, before anything is allocated; shared layers are within the limit."""
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for module, pages in adapter.linears.items():
            ranks[module] = ranks.get(module, 0) + pages.lora_rank
        for layer, by_rank in _own_experts(adapter, shared_layers).items():
            for pages in by_rank:
                for expert in pages.regions:
                    name = f"expert {expert} of layer {layer}"
                    ranks[name] = ranks.get(name, 0) + pages.lora_rank
    return ranks


def _shares(weight: float, by_rank: Sequence[HostPages]) -> dict[int, _Share]:
    return {expert: _Share(weight, pages, page) for pages in by_rank for page, expert in enumerate(pages.regions)}


def _rank(shares: Sequence[_Share]) -> int:
    return sum(share.pages.lora_rank for share in shares)


def _join_experts(experts: Mapping[int, list[_Share]]) -> list[HostPages]:
    """One HostPages for each joined rank, experts in order."""
    by_rank: dict[int, dict[int, list[_Share]]] = {}
    for expert, shares in sorted(experts.items()):
        by_rank.setdefault(_rank(shares), {})[expert] = shares
    return [_join(rank, group) for rank, group in sorted(by_rank.items())]


def _join_shared(layer: int, parts: Sequence[tuple[float, HostAdapter]]) -> SharedOuterPages:
    """Outer factors stacked once for the layer; an expert that a part lacks has zeros in its place of the rank."""
    owns = [(weight, adapter.shared_outer[layer]) for weight, adapter in parts if layer in adapter.shared_outer]
    outer = [_Share(weight, own.outer, 0) for weight, own in owns]
    experts = _union(own for _, own in owns)
    inner = zip(*(_inner_shares(weight, own.inner, experts) for weight, own in owns), strict=True)
    rank = _rank(outer)
    return SharedOuterPages(_join(rank, {0: outer}), _join(rank, dict(zip(experts, inner, strict=True))))


def _inner_shares(weight: float, inner: HostPages, experts: Sequence[int]) -> list[_Share]:
    page_of = {expert: page for page, expert in enumerate(inner.regions)}
    zeros = {name: factor.new_zeros(1, *factor.shape[1:]) for name, factor in inner.factors.items()}
    lacking = HostPages(inner.lora_rank, [], zeros, inner.a_rows_first)
    return [
        _Share(weight, inner, page_of[expert]) if expert in page_of else _Share(weight, lacking, 0)
        for expert in experts
    ]


def _join(rank: int, regions: Mapping[int, Sequence[_Share]]) -> HostPages:
    """Pages of regions that have the same joined rank."""
    like = next(iter(regions.values()))[0].pages
    factors = {name: _empty(like, name, len(regions), rank) for name in like.factors}
    joined = HostPages(rank, list(regions), factors, like.a_rows_first)
    # Pages that come from one pool and go to one place of the rank are copied together.
    moves: dict[tuple[int, float, int], tuple[HostPages, list[int], list[int]]] = {}
    for page, shares in enumerate(regions.values()):
        start = 0
        for share in shares:
            _, sources, targets = moves.setdefault((id(share.pages), share.weight, start), (share.pages, [], []))
            sources.append(share.page)
            targets.append(page)
            start += share.pages.lora_rank
    for (_, weight, start), (pages, sources, targets) in moves.items():
        for name in factors:
            _copy(pages, joined, name, weight, start, torch.tensor(sources), torch.tensor(targets))
    return joined


def _empty(like: HostPages, name: str, num_pages: int, rank: int) -> Tensor:
    shape = list(like.factors[name].shape)
    along = 1 if _is_b(name) or like.a_rows_first else 2
    shape[along] = shape[along] // like.lora_rank * rank
    return like.factors[name].new_empty(num_pages, *shape[1:])


def _copy(
    source: HostPages, target: HostPages, name: str, weight: float, start: int, from_P: Tensor, to_P: Tensor
) -> None:
    """Fill ranks `start` and following of the target's pages; all ranks of a page are filled by its shares."""
    values = _by_rank(source, name).index_select(0, from_P)
    if _is_b(name) and weight != 1.0:
        values = (values.float() * weight).to(values.dtype)
    _by_rank(target, name)[:, start : start + source.lora_rank].index_copy_(0, to_P, values)


def _by_rank(pages: HostPages, name: str) -> Tensor:
    """A view of a factor whose second dimension is the rank: B as [P, R, N], A as [P, R, sides, inputs]."""
    stored = pages.factors[name]
    if _is_b(name):
        return stored
    if pages.a_rows_first:
        return stored.view(len(stored), -1, pages.lora_rank, stored.shape[2]).transpose(1, 2)
    return stored.view(len(stored), stored.shape[1], -1, pages.lora_rank).permute(0, 3, 2, 1)


def _is_b(name: str) -> bool:
    return name.startswith("b")
