"""All adapters' pages on the device: a pool for each module and padded rank in use, and a second one for newcomers.

A pool grows by being copied, so an adapter that finds no vacant pages would move those of all others. Instead it joins
a young pool beside the large one, and the two become one when adapters come and go no more, or after a while. Steps
make one more product for the young one, if they use its adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch

from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.page_pool import HostPages, PagePool
from runtime.adapters.spare_experts import SpareExperts
from runtime.models.deepseek.moe import ExpertGroups

# A copy takes as long as one of so many bytes however small it is.
_MIN_COPY_BYTES = 512 * 2**10

OLD, YOUNG = 0, 1

# By padded rank and age: the pools of one module or layer.
Pools = dict[tuple[int, int], PagePool]


@dataclass(frozen=True)
class Home:
    """Pools, pages that belong into one of them, how many regions it has, and whether there may be a young one."""

    pools: Pools
    pages: HostPages
    num_regions: int
    ages: tuple[int, ...] = (OLD, YOUNG)

    def pools_of_rank(self) -> dict[int, PagePool]:
        """By age."""
        keys = ((age, (self.pages.lora_rank, age)) for age in self.ages)
        return {age: self.pools[key] for age, key in keys if key in self.pools}


class DevicePages:
    """Pools of the dense modules by name, and of the routed experts by layer.

    Of adapters whose outer factors are shared by a layer's experts, `inner` has the pools of the others and `outer`
    those of the shared ones, which have one region. `spare` holds whole experts that adapters bring.

    Of pages at most `max_copy_bytes`, or one page of one factor, are copied between two steps.
    """

    def __init__(
        self,
        num_experts: int,
        max_slots: int,
        device: torch.device,
        max_copy_bytes: int = 8 * 2**20,
        spare: Mapping[int, ExpertGroups] | None = None,
    ) -> None:
        self.linears: dict[str, Pools] = {}
        self.experts: dict[int, Pools] = {}
        self.inner: dict[int, Pools] = {}
        self.outer: dict[int, Pools] = {}
        self.spare = SpareExperts(spare or {}, num_experts, max_slots, device)
        self.max_slots = max_slots
        self._num_experts = num_experts
        self._device = device
        self._max_copy_bytes = max_copy_bytes
        self._totals: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages that adapters have, and of the experts that they bring."""
        return self._bytes()[0] + self.spare.num_used_bytes

    @property
    def vacant_bytes(self) -> int:
        """Bytes of pages that adapters have left, until others use them or they are given back."""
        return self._bytes()[1]

    def best_slot(self, free_slots: list[int], adapter: HostAdapter) -> int:
        """The free slot whose vacant pages take most of an adapter's bytes, or of such the one that has fewest others.

        Of equal ones it is the last of the list.
        """
        served = dict.fromkeys(reversed(free_slots), 0)
        left = dict.fromkeys(free_slots, 0)
        for home in chain.from_iterable(self._homes(adapter)):
            for pool in home.pools_of_rank().values():
                if pool.vacant_bytes:
                    for slot in pool.slots_that_hold(free_slots, home.pages):
                        served[slot] += home.pages.num_bytes
        for pool in self._pools():
            for slot in free_slots if pool.vacant_bytes else ():
                left[slot] += pool.places.num_vacant_of(slot) * pool.page_bytes
        return max(served, key=lambda slot: (served[slot], -left[slot]))

    def install(self, slot: int, adapter: HostAdapter, max_bytes: float = math.inf) -> Iterator[None]:
        """Take a slot's spare experts at once, then copy an adapter to the device, yielding between pieces and after
        each whole expert, so that steps can run in between.

        No row of a batch may use the slot before the iterator is exhausted. Vacant pages are given back first where
        all pages together would take more than `max_bytes` with the new ones.
        """
        if adapter.replaced:
            self.spare.allocate(slot, adapter.replaced)
        return self._copy(slot, adapter, max_bytes)

    def _copy(self, slot: int, adapter: HostAdapter, max_bytes: float) -> Iterator[None]:
        yield from self.spare.install(slot, adapter.replaced)
        homes = chain.from_iterable(self._homes(adapter))
        yield from self._paced(num_bytes for home in homes for num_bytes in self._insert(home, slot, max_bytes))

    def remove(self, slot: int) -> None:
        """Leave every page of a slot vacant and free its spare experts; nothing is copied."""
        self.spare.free(slot)
        for pool in self._pools():
            if slot in pool.slots:
                pool.remove(slot)
        self._totals = None

    @property
    def has_young(self) -> bool:
        """Whether there are young pools."""
        return any(age == YOUNG for pools in self._groups() for _, age in pools)

    def compact(self) -> Iterator[None]:
        """Give all vacant pages back to the device's allocator and merge young pools with old ones.

        Yields after each piece as `install` does.
        """
        yield from self._paced(self._merging(keep_vacant=False))
        yield from self._paced(self._compacting(0))

    def merge(self) -> Iterator[None]:
        """Merge young pools with old ones, and keep what is vacant; yields likewise."""
        yield from self._paced(self._merging(keep_vacant=True))

    def _homes(self, adapter: HostAdapter) -> list[list[Home]]:
        """Layer by layer, and then the linear modules: pools, the pages that belong there, and how many regions."""
        layers: list[list[Home]] = [
            [Home(self.experts.setdefault(layer, {}), pages, self._num_experts) for pages in by_rank]
            for layer, by_rank in adapter.experts.items()
        ]
        for layer, own in adapter.shared_outer.items():
            outer, inner = self.outer.setdefault(layer, {}), self.inner.setdefault(layer, {})
            # Outer and inner pools belong together by their rank alone.
            layers.append([Home(outer, own.outer, 1, (OLD,)), Home(inner, own.inner, self._num_experts, (OLD,))])
        linears = [Home(self.linears.setdefault(name, {}), pages, 1) for name, pages in adapter.linears.items()]
        return [*layers, linears]

    def _insert(self, home: Home, slot: int, max_bytes: float) -> Iterator[int]:
        pages = home.pages
        while not any(slot in pool.slots for pool in home.pools_of_rank().values()):
            age, pool = self._pool_for(home, slot)
            has_room = sum(self._bytes()) + pages.num_bytes <= max_bytes
            if not has_room and not pool.slots_that_hold([slot], pages):
                yield from self._compacting(max_bytes - pages.num_bytes + pool.vacant_bytes, besides=pool)
            yield from pool.inserting(slot, pages, self._max_copy_bytes, keep_vacant=has_room)
            # Registered when it is complete: meanwhile a pool that was all vacant may have been given back.
            home.pools.setdefault((pages.lora_rank, age), pool)
            self._totals = None

    def _pool_for(self, home: Home, slot: int) -> tuple[int, PagePool]:
        """The pool whose vacant pages a slot can take, else the one of which least has to be copied."""
        pools = home.pools_of_rank()
        for age, pool in pools.items():
            if pool.slots_that_hold([slot], home.pages):
                return age, pool
        new = PagePool(home.pages, home.num_regions, self.max_slots, self._device)
        if OLD not in pools:
            return OLD, new
        young = pools.get(YOUNG, new)
        # A young pool for its own sake would only be merged again.
        is_worth = YOUNG in home.ages and max(young.all_bytes, home.pages.num_bytes) < pools[OLD].all_bytes
        return (YOUNG, young) if is_worth else (OLD, pools[OLD])

    def _merging(self, *, keep_vacant: bool) -> Iterator[int]:
        for pools in self._groups():
            for rank in [rank for rank, age in pools if age == YOUNG]:
                young = pools[rank, YOUNG]
                old = pools.get((rank, OLD))
                if not keep_vacant and old is not None and not (old.slots or young.slots):
                    del pools[rank, OLD], pools[rank, YOUNG]
                    self._totals = None
                    continue
                if old is None:
                    pools[rank, OLD] = young
                elif not (yield from old.merging(young, self._max_copy_bytes, keep_vacant=keep_vacant)):
                    continue
                del pools[rank, YOUNG]
                self._totals = None

    def _compacting(self, max_bytes: float, besides: PagePool | None = None) -> Iterator[int]:
        """Compact pools, those with most vacant bytes first, until all pages take at most `max_bytes`."""
        if sum(self._bytes()) <= max_bytes:
            return
        found = [(pools, key, pool) for pools in self._groups() for key, pool in pools.items()]
        vacant = [item for item in found if item[2].places.num_vacant and item[2] is not besides]
        for pools, key, pool in sorted(vacant, key=lambda item: -item[2].vacant_bytes):
            if sum(self._bytes()) <= max_bytes:
                return
            if not pool.slots:
                del pools[key]
            else:
                yield from pool.compacting(self._max_copy_bytes)
            self._totals = None

    def _paced(self, copies: Iterator[int]) -> Iterator[None]:
        """Copy, pausing before what would make a piece too large."""
        num_moved = 0
        for num_bytes in copies:
            moved = max(num_bytes, _MIN_COPY_BYTES)
            if num_moved and num_moved + moved > self._max_copy_bytes:
                yield
                num_moved = 0
            num_moved += moved

    def _bytes(self) -> tuple[int, int]:
        if self._totals is None:
            pools = self._pools()
            self._totals = sum(pool.num_bytes for pool in pools), sum(pool.vacant_bytes for pool in pools)
        return self._totals

    def _groups(self) -> list[Pools]:
        return [*self.linears.values(), *self.experts.values(), *self.inner.values(), *self.outer.values()]

    def _pools(self) -> list[PagePool]:
        return [pool for pools in self._groups() for pool in pools.values()]
