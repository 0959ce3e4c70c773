"""Device memory for LoRA factors: pages ordered by region, so that one group list over them serves all adapters.

A region is an expert (or the only region of a dense module); a page holds one adapter's factors for one region.
There are no pages for what an adapter leaves alone: the table maps it to -1 and its rows are never multiplied, so
storage is exact. Pages ascend by (region, slot), which is the order in which the batch sorts its rows.

A slot that leaves a pool copies nothing: its pages become vacant. The next adapter of that slot is written into them if
they have all the places that it needs; else the pool is copied, without what is vacant, into tensors of the new size.
Steps may run between the copies: they see the pool as it was until all of it is there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.adapters.page_places import Owner, PagePlaces


@dataclass(frozen=True)
class HostPages:
    """An adapter's pages for one pool in host memory: `factors[name]` is [len(regions), rows, columns].

    Regions ascend. A's factors, whose names begin with "a", lie transposed, [.., R, K], if `a_rows_first`.
    """

    lora_rank: int
    regions: list[int]
    factors: Mapping[str, Tensor]
    a_rows_first: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(tensor.nbytes for tensor in self.factors.values())


class PagePool:
    """All pages of one module and one padded rank. What `places` says of them can be asked of the pool."""

    def __init__(self, like: HostPages, num_regions: int, max_slots: int, device: torch.device) -> None:
        self.device = device
        self.lora_rank = like.lora_rank
        self.factors = {
            name: tensor.new_empty((0, *tensor.shape[1:]), device=device) for name, tensor in like.factors.items()
        }
        self.places = PagePlaces((), (num_regions, max_slots), device)
        self.page_bytes = sum(tensor[:1].nbytes for tensor in like.factors.values())
        self._a_rows_first = like.a_rows_first
        self._num_writes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages that are in use."""
        return self.page_bytes * self.places.num_occupied

    @property
    def vacant_bytes(self) -> int:
        """Bytes of the vacant pages."""
        return self.page_bytes * self.places.num_vacant

    @property
    def num_pages(self) -> int:
        """Pages of all slots, the vacant ones among them."""
        return len(self.places.owners)

    @property
    def slots(self) -> frozenset[int]:
        """Slots that have a page."""
        return self.places.slots

    @property
    def whole_slots(self) -> frozenset[int]:
        """Slots that have a page in every region."""
        return self.places.whole_slots

    @property
    def table(self) -> Tensor:
        """See PagePlaces."""
        return self.places.table

    @property
    def next_regions_P(self) -> Tensor:
        """See PagePlaces."""
        return self.places.next_regions_P

    @property
    def next_slots_P(self) -> Tensor:
        """See PagePlaces."""
        return self.places.next_slots_P

    @property
    def layout(self) -> bytes:
        """See PagePlaces."""
        return self.places.layout

    def factor(self, name: str) -> Tensor:
        """All pages of one factor, [P, K, R] for A and [P, R, N] for B; a transposed view where it lies so."""
        stored = self.factors[name]
        return stored.transpose(1, 2) if self._a_rows_first and name.startswith("a") else stored

    def page(self, slot: int, region: int) -> int:
        """The page of a slot that has this region, known without asking the device."""
        return self.places.page_of[region, slot]

    def slots_that_hold(self, slots: list[int], pages: HostPages) -> list[int]:
        """Those of the slots whose vacant pages are all that these need."""
        regions = frozenset(pages.regions)
        return [slot for slot in slots if self.places.can_hold(slot, regions)]

    def inserting(self, slot: int, pages: HostPages, max_copy_bytes: int) -> Iterator[int]:
        """Add a slot's pages piece by piece: yields before each copy how many bytes it is going to move.

        A copy moves at most `max_copy_bytes`, or one page of one factor. Slots may be removed, inserted and pages
        compacted in between: what they make obsolete begins again. An allocation that fails leaves the pool as it was.
        """
        while slot not in self.slots:
            if self.slots_that_hold([slot], pages):
                yield from self._write(slot, pages, max_copy_bytes)
            else:
                yield from self._rebuild(slot, pages, max_copy_bytes)

    def compacting(self, max_copy_bytes: int) -> Iterator[int]:
        """Give the memory of vacant pages back, in such pieces as `inserting`; ends early if the pool changes."""
        if self.places.num_vacant:
            yield from self._rebuild(-1, None, max_copy_bytes)

    def remove(self, slot: int) -> None:
        """Leave a slot's pages vacant."""
        self.places.vacate(slot)

    def _write(self, slot: int, pages: HostPages, max_copy_bytes: int) -> Iterator[int]:
        factors = self.factors
        index = self._index([self.page(slot, region) for region in pages.regions])
        for name, part in _parts(pages.factors, max_copy_bytes):
            yield pages.factors[name][part].nbytes
            if self.factors is not factors:
                return
            self._num_writes += 1
            factors[name].index_copy_(0, index[part], pages.factors[name][part].to(self.device))
        self.places.occupy({slot: set(pages.regions)})

    def _rebuild(self, slot: int, pages: HostPages | None, max_copy_bytes: int) -> Iterator[int]:
        """Copy what is occupied, and the slot's pages if there are any, to new tensors; these replace the old ones."""
        factors, num_writes = self.factors, self._num_writes
        added = [(region, slot) for region in pages.regions] if pages is not None else []
        places = PagePlaces(sorted(self.places.occupied_owners() + added), self.places.size, self.device)
        target = {name: old.new_empty((len(places.owners), *old.shape[1:])) for name, old in factors.items()}
        fill = _Fill(self, places, added)
        for name, part in _parts(target, max_copy_bytes):
            yield target[name][part].nbytes
            if self.factors is not factors or self._num_writes != num_writes:
                return
            fill.copy(target[name], name, part, pages)
        # What was removed meanwhile stays vacant in the new tensors.
        places.occupy(self.places.occupied)
        if pages is not None:
            places.occupy({slot: set(pages.regions)})
        self.factors, self.places = target, places

    def _index(self, pages: list[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self.device)


class _Fill:
    """Where each page of a rebuilt pool comes from."""

    def __init__(self, pool: PagePool, places: PagePlaces, added: list[Owner]) -> None:
        self._pool = pool
        old, is_added = pool.places.page_of, set(added)
        # The places of added pages are filled with any page first, so that one operation copies the others.
        self._from_P = pool._index([0 if owner in is_added else old[owner] for owner in places.owners])
        self._has_old = len(places.owners) > len(added)
        self._added_to = [places.page_of[owner] for owner in added]
        self._added_to_P = pool._index(self._added_to)

    def copy(self, target: Tensor, name: str, part: slice, pages: HostPages | None) -> None:
        """Fill the pages `part` of one factor."""
        if self._has_old:
            torch.index_select(self._pool.factors[name], 0, self._from_P[part], out=target[part])
        if pages is not None:
            rows = slice(bisect_left(self._added_to, part.start), bisect_left(self._added_to, part.stop))
            target.index_copy_(0, self._added_to_P[rows], pages.factors[name][rows].to(target.device))


def _parts(factors: Mapping[str, Tensor], max_bytes: int) -> Iterator[tuple[str, slice]]:
    """All pages of all factors, some of one factor at a time."""
    for name, tensor in factors.items():
        num_pages = max(1, max_bytes // max(1, tensor[:1].nbytes))
        for start in range(0, len(tensor), num_pages):
            yield name, slice(start, min(start + num_pages, len(tensor)))
