"""All adapters' pages on the device: one pool for each module and padded rank in use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain

import torch

from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.page_pool import HostPages, PagePool
from runtime.adapters.spare_experts import SpareExperts
from runtime.models.deepseek.moe import ExpertGroups

# By padded rank: the pools of one module or layer.
Pools = dict[int, PagePool]
# Pools, pages that belong into one of them, and how many regions it has.
Home = tuple[Pools, HostPages, int]


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
        for pools, pages, _ in chain.from_iterable(self._homes(adapter)):
            pool = pools.get(pages.lora_rank)
            if pool is not None and pool.vacant_bytes:
                for slot in pool.slots_that_hold(free_slots, pages):
                    served[slot] += pages.num_bytes
        for pool in self._pools():
            for slot in free_slots if pool.vacant_bytes else ():
                left[slot] += pool.places.num_vacant_of(slot) * pool.page_bytes
        return max(served, key=lambda slot: (served[slot], -left[slot]))

    def install(self, slot: int, adapter: HostAdapter, max_bytes: float = math.inf) -> Iterator[None]:
        """Take a slot's spare experts at once, then copy an adapter to the device, yielding after each piece of a layer
        and each whole expert, so that steps can run in between.

        No row of a batch may use the slot before the iterator is exhausted. Vacant pages are given back first where
        all pages together would take more than `max_bytes` with the new ones.
        """
        if adapter.replaced:
            self.spare.allocate(slot, adapter.replaced)
        return self._copy(slot, adapter, max_bytes)

    def _copy(self, slot: int, adapter: HostAdapter, max_bytes: float) -> Iterator[None]:
        yield from self.spare.install(slot, adapter.replaced)
        for homes in self._homes(adapter):
            yield from self._paced(each for home in homes for each in self._insert(home, slot, max_bytes))
            yield

    def remove(self, slot: int) -> None:
        """Leave every page of a slot vacant and free its spare experts; nothing is copied."""
        self.spare.free(slot)
        for pool in self._pools():
            if slot in pool.slots:
                pool.remove(slot)
        self._totals = None

    def compact(self) -> Iterator[None]:
        """Give all vacant pages back to the device's allocator, yielding after each piece as `install` does."""
        yield from self._paced(self._compacting(0))

    def _homes(self, adapter: HostAdapter) -> list[list[Home]]:
        """Layer by layer, and then the linear modules: pools, the pages that belong there, and how many regions."""
        layers: list[list[Home]] = [
            [(self.experts.setdefault(layer, {}), pages, self._num_experts) for pages in by_rank]
            for layer, by_rank in adapter.experts.items()
        ]
        for layer, own in adapter.shared_outer.items():
            outer, inner = self.outer.setdefault(layer, {}), self.inner.setdefault(layer, {})
            layers.append([(outer, own.outer, 1), (inner, own.inner, self._num_experts)])
        linears = [(self.linears.setdefault(name, {}), pages, 1) for name, pages in adapter.linears.items()]
        return [*layers, linears]

    def _insert(self, home: Home, slot: int, max_bytes: float) -> Iterator[int]:
        pools, pages, num_regions = home
        rank = pages.lora_rank
        while rank not in pools or slot not in pools[rank].slots:
            pool = pools.get(rank) or PagePool(pages, num_regions, self.max_slots, self._device)
            if not pool.slots_that_hold([slot], pages):
                yield from self._compacting(max_bytes - pages.num_bytes + pool.vacant_bytes, besides=pool)
            yield from pool.inserting(slot, pages, self._max_copy_bytes)
            # Registered when it is complete: meanwhile a pool that was all vacant may have been given back.
            pools.setdefault(rank, pool)
            self._totals = None

    def _compacting(self, max_bytes: float, besides: PagePool | None = None) -> Iterator[int]:
        """Compact pools, those with most vacant bytes first, until all pages take at most `max_bytes`."""
        if sum(self._bytes()) <= max_bytes:
            return
        found = [(pools, rank, pool) for pools in self._groups() for rank, pool in pools.items()]
        vacant = [item for item in found if item[2].places.num_vacant and item[2] is not besides]
        for pools, rank, pool in sorted(vacant, key=lambda item: -item[2].vacant_bytes):
            if sum(self._bytes()) <= max_bytes:
                return
            if not pool.slots:
                del pools[rank]
            else:
                yield from pool.compacting(self._max_copy_bytes)
            self._totals = None

    def _paced(self, copies: Iterator[int]) -> Iterator[None]:
        """Copy, pausing before what would make a piece too large."""
        num_moved = 0
        for num_bytes in copies:
            if num_moved and num_moved + num_bytes > self._max_copy_bytes:
                yield
                num_moved = 0
            num_moved += num_bytes

    def _bytes(self) -> tuple[int, int]:
        if self._totals is None:
            pools = self._pools()
            self._totals = sum(pool.num_bytes for pool in pools), sum(pool.vacant_bytes for pool in pools)
        return self._totals

    def _groups(self) -> list[Pools]:
        return [*self.linears.values(), *self.experts.values(), *self.inner.values(), *self.outer.values()]

    def _pools(self) -> list[PagePool]:
        return [pool for pools in self._groups() for pool in pools.values()]
