"""Which page of LoRA factors each row of a product has.

Shape suffixes: M rows, P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraRows:
    """The pages of rows that are sorted by (region, slot), as the pages are; a back-end asks for what it needs.

    `find_pages` (int64 [M]): each row's page, -1 where there is none. `find_ends` (int64 [P]): a cumulative group list
    that covers all rows: a page's rows and, with them, some neighbours that have no page, whatever the adapters leave
    out. What such a row adds is then replaced by zeros. `all_have_pages`: known on the host, so that nothing need be
    replaced.
    """

    find_pages: Callable[[], Tensor]
    find_ends: Callable[[], Tensor]
    num_pages: int
    all_have_pages: bool = False
    _parts: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_pages(cls, pages_M: Tensor, num_pages: int, *, all_have_pages: bool = False) -> LoraRows:
        """For rows of which only the pages are known; a row without one is counted to the page before it."""

        def find_ends() -> Tensor:
            nearest_M = pages_M.cummax(0).values.clamp(min=0)
            return torch.searchsorted(nearest_M, torch.arange(num_pages, device=pages_M.device), right=True)

        return cls(lambda: pages_M, find_ends, num_pages, all_have_pages)

    @classmethod
    def of_one_page(cls, page: int, num_rows: int, num_pages: int, device: torch.device) -> LoraRows:
        """All rows have the same page."""

        def find_ends() -> Tensor:
            ends_P = torch.zeros(num_pages, dtype=torch.int64, device=device)
            ends_P[page:] = num_rows
            return ends_P

        def find_pages() -> Tensor:
            return torch.full((num_rows,), page, dtype=torch.int64, device=device)

        return cls(find_pages, find_ends, num_pages, all_have_pages=True)

    @cached_property
    def pages_M(self) -> Tensor:
        """Each row's page, int64, -1 where there is none."""
        return self.find_pages()

    @cached_property
    def ends_P(self) -> Tensor:
        """Cumulative group list over the pages, int64: the row after each page's last one; the last entry is M."""
        return self.find_ends()

    @cached_property
    def without_page_M1(self) -> Tensor | None:
        """Whether a row has no page, as a column; None if all have."""
        return None if self.all_have_pages else (self.pages_M < 0)[:, None]

    def part(self, pages: slice, num_rows: int) -> tuple[Tensor, Tensor | None]:
        """For a product with some of the pages alone: a group list over all rows, and which rows have none of them.

        Rows before the first of these pages are counted to it, and those after the last one to that one. The pages
        are cut into the same parts in every call.
        """
        if pages.start not in self._parts:
            self._parts[pages.start] = self._part(pages, num_rows)
        return self._parts[pages.start]

    def _part(self, pages: slice, num_rows: int) -> tuple[Tensor, Tensor | None]:
        if pages.stop - pages.start == self.num_pages:
            return self.ends_P, self.without_page_M1
        ends = self.ends_P[pages]
        if pages.stop < self.num_pages:
            ends = ends.clone()
            ends[-1:] = num_rows
        return ends, self._outside(pages, num_rows)[:, None]

    def _outside(self, pages: slice, num_rows: int) -> Tensor:
        if self.all_have_pages:
            # Rows of consecutive pages are consecutive, so places say the same, without asking for each row's page.
            rows_M = torch.arange(num_rows, device=self.ends_P.device)
            first = self.ends_P[pages.start - 1] if pages.start else 0
            return _not_between(rows_M, first, self.ends_P[pages.stop - 1])
        return _not_between(self.pages_M, pages.start, pages.stop)


def _not_between(x: Tensor, first: Tensor | int, stop: Tensor | int) -> Tensor:
    is_outside: Tensor = (x < first) | (x >= stop)
    return is_outside
