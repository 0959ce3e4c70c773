"""The pages of new tensors, filled from pools and from an adapter in host memory, some of one factor at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageSource:
    """Pages that go to new places: page `from_pages[i]` of `factors` to page `to_pages[i]`, which ascend.

    Without `from_pages` they are all pages in their order, of an adapter in host memory.
    """

    factors: Mapping[str, Tensor]
    from_pages: Sequence[int] | None
    to_pages: Sequence[int]


class PageCopies:
    """Fills tensors of `num_pages` pages, all of which have a source."""

    def __init__(self, sources: Sequence[PageSource], num_pages: int, device: torch.device) -> None:
        self._device = device
        # What comes from the first pool is copied in one operation: it fills other places too, with any page.
        self._first: tuple[Mapping[str, Tensor], Tensor] | None = None
        if sources and sources[0].from_pages is not None:
            page_at = dict(zip(sources[0].to_pages, sources[0].from_pages, strict=True))
            self._first = sources[0].factors, self._index([page_at.get(page, 0) for page in range(num_pages)])
        others = sources[1:] if self._first is not None else sources
        self._others = [(each, self._index(each.from_pages or ()), self._index(each.to_pages)) for each in others]

    def copy(self, target: Tensor, name: str, part: slice) -> None:
        """Fill the pages `part` of one factor."""
        if self._first is not None:
            factors, from_P = self._first
            torch.index_select(factors[name], 0, from_P[part], out=target[part])
        for source, from_P, to_P in self._others:
            rows = slice(bisect_left(source.to_pages, part.start), bisect_left(source.to_pages, part.stop))
            if rows.start < rows.stop:
                target.index_copy_(0, to_P[rows], self._pages(source, name, from_P, rows))

    def _pages(self, source: PageSource, name: str, from_P: Tensor, rows: slice) -> Tensor:
        stored = source.factors[name]
        if source.from_pages is None:
            return stored[rows].to(self._device)
        return stored.index_select(0, from_P[rows])

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self._device)


def parts_of(factors: Mapping[str, Tensor], max_bytes: int) -> Iterator[tuple[str, slice]]:
    """All pages of all factors, some of one factor at a time."""
    for name, tensor in factors.items():
        num_pages = max(1, max_bytes // max(1, tensor[:1].nbytes))
        for start in range(0, len(tensor), num_pages):
            yield name, slice(start, min(start + num_pages, len(tensor)))
