"""Which page of a pool belongs to which (region, slot), which of them are vacant, and what a step asks about that."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence, Set
from itertools import chain

import torch
from torch import Tensor

NO_PAGE = -1

Owner = tuple[int, int]
"""(region, slot)."""


class PagePlaces:
    """The owners of all pages, ascending and fixed; each slot occupies its pages or has left them vacant.

    `table[slot + 1, region]` is an occupied page or -1, row 0 is the base. `next_regions_P` and `next_slots_P` say of
    each page, vacant or not, where the next one is; after the last one comes (number of regions, `max_slots`). So rows
    may be counted to a vacant page, but none is led there by the table, and what such rows give is replaced by zeros.
    `layout` is equal where the owners are the same and the same pages are vacant.
    """

    def __init__(self, owners: Sequence[Owner], size: tuple[int, int], device: torch.device) -> None:
        """All are vacant at first. `size` is (number of regions, `max_slots`)."""
        self.owners = owners
        self.size = size
        self.page_of = {owner: page for page, owner in enumerate(owners)}
        self.occupied: dict[int, frozenset[int]] = {}
        self._owner_bytes = array("q", chain.from_iterable(owners)).tobytes()
        self._is_occupied = bytearray(len(owners))
        self._regions_of: dict[int, set[int]] = {}
        for region, slot in owners:
            self._regions_of.setdefault(slot, set()).add(region)
        num_regions, max_slots = size
        following = [*owners[1:], size][: len(owners)]
        next_P2 = torch.tensor(following, dtype=torch.int64, device=device).view(-1, 2)
        self.next_regions_P: Tensor
        self.next_slots_P: Tensor
        self.next_regions_P, self.next_slots_P = next_P2.T.contiguous()
        self.table = torch.full((max_slots + 1, num_regions), NO_PAGE, dtype=torch.int64, device=device)
        self._update()

    def occupy(self, regions_of_slots: Mapping[int, Set[int]]) -> None:
        """These slots, which had no pages, have pages in these regions from now on."""
        rows = []
        for slot, regions in regions_of_slots.items():
            row = [NO_PAGE] * self.size[0]
            for region in regions:
                row[region] = self.page_of[region, slot]
                self._is_occupied[row[region]] = True
            rows.append(row)
            self.occupied[slot] = frozenset(regions)
        if rows:
            index = torch.tensor([slot + 1 for slot in regions_of_slots], device=self.table.device)
            self.table.index_copy_(0, index, torch.tensor(rows, dtype=torch.int64, device=self.table.device))
        self._update()

    def vacate(self, slot: int) -> None:
        """A slot has no pages any more; their places remain."""
        for region in self.occupied.pop(slot, frozenset()):
            self._is_occupied[self.page_of[region, slot]] = False
        self.table[slot + 1].fill_(NO_PAGE)
        self._update()

    def can_hold(self, slot: int, regions: Set[int]) -> bool:
        """Whether a slot that occupies nothing has vacant pages in all these regions."""
        return slot not in self.occupied and regions <= self._regions_of.get(slot, set())

    def num_vacant_of(self, slot: int) -> int:
        """Vacant pages of a slot."""
        return len(self._regions_of.get(slot, ())) - len(self.occupied.get(slot, ()))

    def occupied_owners(self) -> list[Owner]:
        """Ascending."""
        return [owner for owner, is_occupied in zip(self.owners, self._is_occupied, strict=True) if is_occupied]

    @property
    def num_vacant(self) -> int:
        """Pages that nobody occupies."""
        return len(self.owners) - self.num_occupied

    def _update(self) -> None:
        self.num_occupied = sum(map(len, self.occupied.values()))
        self.slots = frozenset(self.occupied)
        self.whole_slots = frozenset(slot for slot, own in self.occupied.items() if len(own) == self.size[0])
        self.layout = self._owner_bytes + bytes(self._is_occupied)
