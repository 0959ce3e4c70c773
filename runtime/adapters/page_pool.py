"""Device memory for LoRA factors: pages ordered by region, so that one group list over them serves all adapters.

A region is an expert (or the only region of a dense module); a page holds one adapter's factors for one region.
There are no pages for what an adapter leaves alone: the table maps it to -1 and its rows are never multiplied, so
storage is exact. Pages ascend by (region, slot), which is the order in which the batch sorts its rows.

A slot that leaves a pool copies nothing: its pages become vacant. The next adapter of that slot is written into them if
they have all the places that it needs; else the pool is copied into tensors of the new size, with what is vacant if
there is room for it: others may be about to come. Steps may run between the copies: they see the pool as it was until
all of it is there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from runtime.adapters.page_copies import PageCopies, PageSource, parts_of
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
    def all_bytes(self) -> int:
        """Bytes of all its pages."""
        return self.page_bytes * self.num_pages

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

    def inserting(
        self, slot: int, pages: HostPages, max_copy_bytes: int, *, keep_vacant: bool = False
    ) -> Iterator[int]:
        """Add a slot's pages piece by piece: yields before each copy how many bytes it is going to move.

        A copy moves at most `max_copy_bytes`, or one page of one factor. Slots may be removed, inserted and pages
        compacted in between: what they make obsolete begins again. An allocation that fails leaves the pool as it was.
        If the pool has to be copied, vacant pages of other slots are left out unless `keep_vacant`.
        """
        while slot not in self.slots:
            if self.slots_that_hold([slot], pages):
                yield from self._write(slot, pages, max_copy_bytes)
            else:
                owners = self.places.owners if keep_vacant else self.places.occupied_owners()
                kept = [owner for owner in owners if owner[1] != slot]
                yield from self._rebuild([(self, kept)], max_copy_bytes, slot, pages)

    def compacting(self, max_copy_bytes: int) -> Iterator[int]:
        """Give the memory of vacant pages back, in such pieces as `inserting`; ends early if the pool changes."""
        if self.places.num_vacant:
            yield from self._rebuild([(self, self.places.occupied_owners())], max_copy_bytes)

    def merging(self, other: PagePool, max_copy_bytes: int, *, keep_vacant: bool) -> Generator[int, None, bool]:
        """Take over all pages of another pool, in such pieces; returns False if it ended early because one changed."""
        mine, others = self.places.occupied_owners(), other.places.occupied_owners()
        if keep_vacant:
            mine += sorted(set(self.places.owners) - {*mine, *others})
            others += sorted(set(other.places.owners) - {*mine, *others})
        return (yield from self._rebuild([(self, mine), (other, others)], max_copy_bytes))

    def remove(self, slot: int) -> None:
        """Leave a slot's pages vacant."""
        self.places.vacate(slot)

    def _write(self, slot: int, pages: HostPages, max_copy_bytes: int) -> Iterator[int]:
        factors = self.factors
        index = self._index([self.page(slot, region) for region in pages.regions])
        for name, part in parts_of(pages.factors, max_copy_bytes):
            yield pages.factors[name][part].nbytes
            if self.factors is not factors:
                return
            self._num_writes += 1
            factors[name].index_copy_(0, index[part], pages.factors[name][part].to(self.device))
        self.places.occupy({slot: set(pages.regions)})

    def _rebuild(
        self,
        kept: Sequence[tuple[PagePool, list[Owner]]],
        max_copy_bytes: int,
        slot: int = -1,
        pages: HostPages | None = None,
    ) -> Generator[int, None, bool]:
        """Copy what is kept of pools, and a slot's pages if there are any, to tensors that replace this pool's.

        Returns False if a pool changed meanwhile. New memory takes as long as copying, so each byte counts four times.
        """
        before = [(pool, pool.factors, pool._num_writes) for pool, _ in kept]
        added = [(region, slot) for region in pages.regions] if pages is not None else []
        owners = sorted(chain(added, *(own for _, own in kept)))
        places = PagePlaces(owners, self.places.size, self.device)
        target = {name: old.new_empty((len(owners), *old.shape[1:])) for name, old in self.factors.items()}
        sources = [_source(pool.factors, pool.places.page_of, own, places) for pool, own in kept if own]
        if pages is not None:
            sources.append(PageSource(pages.factors, None, [places.page_of[owner] for owner in added]))
        copies = PageCopies(sources, len(owners), self.device)
        for name, part in parts_of(target, max_copy_bytes // 4):
            yield 4 * target[name][part].nbytes
            if any(pool.factors is not factors or pool._num_writes != writes for pool, factors, writes in before):
                return False
            copies.copy(target[name], name, part)
        # What was vacant, or was removed meanwhile, is vacant in the new tensors.
        for pool, _ in kept:
            places.occupy(pool.places.occupied)
        if pages is not None:
            places.occupy({slot: set(pages.regions)})
        self.factors, self.places = target, places
        return True

    def _index(self, pages: list[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self.device)


def _source(
    factors: Mapping[str, Tensor], page_of: Mapping[Owner, int], owners: list[Owner], places: PagePlaces
) -> PageSource:
    ascending = sorted(owners)
    return PageSource(
        factors, [page_of[owner] for owner in ascending], [places.page_of[owner] for owner in ascending]
    )
