"""A weighted sum of adapters as one adapter of the joined rank.

w1 B1 A1 + w2 B2 A2 = [w1 B1, w2 B2] [A1; A2]: A is stacked along the rank, the weighted B stand beside each other. This
is done for each module and each expert by itself, so a sum takes exactly the bytes that its parts take: an expert that
only one part adapts has that part's rank. B, which each part holds rounded to the device's type, is multiplied by its
weight in float32 and rounded once more; weights of 1 and -1 round nothing. Outer
factors that a part has once for all experts of a layer stand in the sum once for each.

Shape suffixes: P pages of a pool, R rank, N outputs; a factor A is seen as [P, R, sides, inputs].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.errors import AdapterError
from runtime.adapters.host_adapter import HostAdapter, require_finite
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
    parts = [(weight, adapter.expanded()) for weight, adapter in parts]
    ranks = _joined_ranks([adapter for _, adapter in parts])
    name, rank = max(ranks.items(), key=lambda item: item[1], default=("", 0))
    if rank > max_lora_rank:
        raise AdapterError(f"the joined rank is {rank} ({name}), and that of a sum may be {max_lora_rank} at most")
    linears: dict[str, list[_Share]] = {}
    layers: dict[int, dict[int, list[_Share]]] = {}
    for weight, adapter in parts:
        for module, pages in adapter.linears.items():
            linears.setdefault(module, []).append(_Share(weight, pages, 0))
        for layer, by_rank in adapter.experts.items():
            for expert, share in _shares(weight, by_rank).items():
                layers.setdefault(layer, {}).setdefault(expert, []).append(share)
    joined = HostAdapter(
        {module: _join(_rank(shares), {0: shares}) for module, shares in linears.items()},
        {layer: _join_experts(experts) for layer, experts in sorted(layers.items())},
    )
    require_finite(joined.linears, joined.experts)
    return joined


def _joined_ranks(adapters: Sequence[HostAdapter]) -> dict[str, int]:
    """The rank that each module would have, before anything is allocated."""
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for module, pages in adapter.linears.items():
            ranks[module] = ranks.get(module, 0) + pages.lora_rank
        for layer, by_rank in adapter.experts.items():
            for pages in by_rank:
                for expert in pages.regions:
                    name = f"expert {expert} of layer {layer}"
                    ranks[name] = ranks.get(name, 0) + pages.lora_rank
    return ranks


def _shares(weight: float, by_rank: Sequence[HostPages]) -> dict[int, _Share]:
    return {
        expert: _Share(weight, pages, page) for pages in by_rank for page, expert in enumerate(pages.regions)
    }


def _rank(shares: Sequence[_Share]) -> int:
    return sum(share.pages.lora_rank for share in shares)


def _join_experts(experts: Mapping[int, list[_Share]]) -> list[HostPages]:
    """One HostPages for each joined rank, experts in order."""
    by_rank: dict[int, dict[int, list[_Share]]] = {}
    for expert, shares in sorted(experts.items()):
        by_rank.setdefault(_rank(shares), {})[expert] = shares
    return [_join(rank, group) for rank, group in sorted(by_rank.items())]


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
