"""Which adapters are on the device: a bounded number of slots and bytes, given in the order in which they are wanted.

Who is wanted longest is seated first. A seat is taken from the adapter that was used least recently, never from one
that is pinned or that requests hold. When no seat can be had so, an adapter that has held its own for longer than the
cycle yields: its waiting requests do not begin, and when the running ones have ended it gives up its seat and queues
again, so that adapters that share too few slots take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from runtime.adapters.compaction import Compaction
from runtime.adapters.device_pages import DevicePages
from runtime.adapters.record import AdapterRecord


@dataclass
class TierCounts:
    """How often a request found its adapter there, how often one came in, and how often one had to leave."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class DeviceTier:
    """Slots, pages and who waits for them. `on_change` hears of every adapter that came, left, or has to yield."""

    def __init__(
        self, pages: DevicePages, max_bytes: int, cycle_seconds: float, on_change: Callable[[AdapterRecord], None]
    ) -> None:
        self.pages = pages
        self.max_bytes = max_bytes
        self.counts = TierCounts()
        self.compaction = Compaction(pages)
        self._cycle_seconds = cycle_seconds
        self._on_change = on_change
        self._free_slots = list(range(pages.max_slots - 1, -1, -1))
        self._resident: set[AdapterRecord] = set()
        self._installing: list[tuple[AdapterRecord, Iterator[None]]] = []
        self._wanted: dict[AdapterRecord, float] = {}

    @property
    def num_resident(self) -> int:
        """Adapters whose pages are complete."""
        return len(self._resident)

    @property
    def used_bytes(self) -> int:
        """Bytes of the adapters that are there or being copied."""
        return sum(record.device_bytes for record in self._seated())

    @property
    def is_installing(self) -> bool:
        """Whether copies are under way."""
        return bool(self._installing)

    @property
    def num_wanted(self) -> int:
        """Adapters that requests wait for and that have no seat yet."""
        return len(self._wanted)

    def holds(self, record: AdapterRecord) -> bool:
        """Whether its pages are there or being copied."""
        return record.slot >= 0

    def want(self, record: AdapterRecord) -> None:
        """Seat an adapter, whose pages are in host memory, as soon as a seat can be had."""
        if not self.holds(record):
            self._wanted.setdefault(record, time.monotonic())

    def unwant(self, record: AdapterRecord) -> None:
        """Nobody waits for it any more."""
        self._wanted.pop(record, None)

    def seat(self, record: AdapterRecord, *, evict: bool) -> bool:
        """Begin to copy an adapter to the device, if need be in the place of others; False if there is no place."""
        if record.host is None or self.holds(record):
            return self.holds(record)
        victims = self._victims(record.facts.device_bytes) if evict else []
        if victims is None or not self._fits(record.facts.device_bytes, victims):
            return False
        for victim in victims:
            self.evict(victim)
        self.unwant(record)
        record.slot = self.pages.best_slot(self._free_slots, record.host)
        self._free_slots.remove(record.slot)
        self._installing.append((record, self.pages.install(record.slot, record.host, self.max_bytes)))
        self.compaction.stop()
        return True

    def advance(self) -> tuple[AdapterRecord, Exception | None] | None:
        """Copy one layer; returns the adapter that is complete now, or that could not be copied, with the reason."""
        record, steps = self._installing[0]
        try:
            if next(steps, self) is not self:
                return None
        except (MemoryError, RuntimeError) as error:
            self.remove(record)
            return record, error
        self._installing.pop(0)
        self.compaction.note()
        self._resident.add(record)
        record.is_resident, record.has_run = True, False
        record.resident_since = time.monotonic()
        self.counts.loads += 1
        self._on_change(record)
        return record, None

    @property
    def can_seat(self) -> bool:
        """Whether the one that waits longest could have a seat now."""
        for record in self._wanted:
            victims = self._victims(record.facts.device_bytes)
            return victims is not None and self._fits(record.facts.device_bytes, victims)
        return False

    def seat_wanted(self) -> None:
        """Give seats to those that wait, oldest first; who cannot be seated keeps the younger ones waiting too."""
        for record in list(self._wanted):
            if not self.seat(record, evict=True):
                break
        self._let_yield()

    def evict(self, record: AdapterRecord) -> None:
        """Take an adapter off the device."""
        self.remove(record)
        self.counts.evictions += 1
        self._on_change(record)

    def remove(self, record: AdapterRecord) -> int:
        """Free slot and pages and forget that it is wanted; returns the bytes of its pages: free for others at once."""
        self.unwant(record)
        if not self.holds(record):
            return 0
        self._installing = [item for item in self._installing if item[0] is not record]
        self._resident.discard(record)
        before = self.pages.num_bytes
        self.pages.remove(record.slot)
        self._free_slots.append(record.slot)
        record.slot = -1
        record.is_resident = record.is_yielding = False
        self.compaction.note()
        return before - self.pages.num_bytes

    def _seated(self) -> list[AdapterRecord]:
        return [*self._resident, *(record for record, _ in self._installing)]

    def _fits(self, num_bytes: int, without: list[AdapterRecord]) -> bool:
        freed = sum(record.device_bytes for record in without)
        return bool(self._free_slots or without) and self.used_bytes - freed + num_bytes <= self.max_bytes

    def _victims(self, num_bytes: int) -> list[AdapterRecord] | None:
        """The fewest adapters, least recently used first, whose leaving makes room; None if all of them do not."""
        victims: list[AdapterRecord] = []
        candidates = sorted(filter(_may_leave, self._resident), key=lambda record: record.age)
        while not self._fits(num_bytes, victims):
            if not candidates:
                return None
            victims.append(candidates.pop(0))
        return victims

    def _let_yield(self) -> None:
        """As many adapters as others wait for seats, those that have held theirs longest, beyond the cycle.

        One whose requests found no place in a batch yet does not: it would leave with nothing done.
        """
        num_yielding = sum(record.is_yielding for record in self._resident)
        due = time.monotonic() - self._cycle_seconds
        staying = [record for record in self._resident if record.has_run and not (record.is_yielding or record.pinned)]
        for record in sorted(staying, key=lambda record: record.resident_since):
            if num_yielding >= len(self._wanted) or record.resident_since > due:
                break
            record.is_yielding = True
            num_yielding += 1
            self._on_change(record)
        if not self._wanted:
            for record in self._resident:
                record.is_yielding = False


def _may_leave(record: AdapterRecord) -> bool:
    if record.pinned or record.num_running:
        return False
    return not record.references or record.is_yielding
