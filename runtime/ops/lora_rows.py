"""Which page of LoRA factors each row of a product has.

Shape suffixes: M rows, P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraRows:
    """The pages of rows that are sorted by (region, slot), as the pages are.

    `pages_M` (int64): each row's page, -1 where there is none. `find_nearest` gives for each row the last page at or
    before its (region, slot), the first page where there is none before: these ascend, so with rows that have no page
    counted to a neighbour's, groups are packed and cover all rows, whatever the adapters leave out. What such a row
    adds is then replaced by zeros. `all_have_pages`: known on the host, so that nothing need be replaced.
    """

    pages_M: Tensor
    find_nearest: Callable[[], Tensor]
    num_pages: int
    all_have_pages: bool = False

    @classmethod
    def of_pages(cls, pages_M: Tensor, num_pages: int) -> LoraRows:
        """For rows of which only the pages are known."""
        return cls(pages_M, lambda: pages_M.cummax(0).values.clamp(min=0), num_pages)

    @classmethod
    def of_one_page(cls, page: int, num_rows: int, num_pages: int, device: torch.device) -> LoraRows:
        """All rows have the same page."""
        pages_M = torch.full((num_rows,), page, dtype=torch.int64, device=device)
        return cls(pages_M, lambda: pages_M, num_pages, all_have_pages=True)

    @cached_property
    def has_page_M1(self) -> Tensor:
        """Whether a row has a page, as a column."""
        return (self.pages_M >= 0)[:, None]

    def outside(self, pages: slice) -> Tensor:
        """Whether a row has none of these pages, as a column."""
        is_outside_M: Tensor = (self.pages_M < pages.start) | (self.pages_M >= pages.stop)
        return is_outside_M[:, None]

    @cached_property
    def ends_P(self) -> Tensor:
        """Cumulative group list over the pages, int64: the row after each page's last one; the last entry is M."""
        pages_P = torch.arange(self.num_pages, device=self.pages_M.device)
        return torch.searchsorted(self.find_nearest(), pages_P, right=True)
