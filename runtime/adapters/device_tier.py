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

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.record import AdapterRecord


@dataclass
class TierCounts:
    """How often a request found its adapter there, how often one came in, and how often one had to leave."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


@dataclass(frozen=True)
class Lack:
    """What is lacking for a seat: a slot, bytes of pages, or spare experts in these layers. False if nothing is."""

    slot: bool
    bytes: bool
    layers: tuple[int, ...]

    def __bool__(self) -> bool:
        return self.slot or self.bytes or bool(self.layers)


class DeviceTier:
    """Slots, pages and who waits for them. `on_change` hears of every adapter that came, left, or has to yield."""

    def __init__(
        self, pages: DevicePages, max_bytes: int, cycle_seconds: float, on_change: Callable[[AdapterRecord], None]
    ) -> None:
        self.pages = pages
        self.max_bytes = max_bytes
        self.counts = TierCounts()
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
        """Bytes of the pages of adapters that are there or being copied."""
        return sum(record.page_bytes for record in self._seated())

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
        victims = self._victims(record) if evict else []
        if victims is None or self._lack(record, victims):
            return False
        for victim in victims:
            self.evict(victim)
        self.unwant(record)
        record.slot = self._free_slots.pop()
        self._installing.append((record, self.pages.install(record.slot, record.host)))
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
        self._resident.add(record)
        record.is_resident, record.has_run = True, False
        record.resident_since = time.monotonic()
        self.counts.loads += 1
        self._on_change(record)
        return record, None

    @property
    def can_seat(self) -> bool:
        """Whether one that waits could have a seat now."""
        return self._next_seated() is not None

    def seat_wanted(self) -> None:
        """Give seats to those that wait, oldest first; who cannot be seated keeps the younger ones waiting too.

        Who lacks spare experts keeps only those waiting that need such as well: when it gets them, with their holder's
        place, it is still the oldest.
        """
        while (record := self._next_seated()) is not None and self.seat(record, evict=True):
            pass
        self._let_yield()

    def _next_seated(self) -> AdapterRecord | None:
        wants_experts = False
        for record in self._wanted:
            if wants_experts and record.facts.replaced:
                continue
            if self._victims(record) is not None:
                return record
            if not self._lack(record, []).layers:
                return None
            wants_experts = True
        return None

    def evict(self, record: AdapterRecord) -> None:
        """Take an adapter off the device."""
        self.remove(record)
        self.counts.evictions += 1
        self._on_change(record)

    def remove(self, record: AdapterRecord) -> int:
        """Free slot and pages and forget that it is wanted; returns how many bytes of pages came back."""
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
        return before - self.pages.num_bytes

    def _seated(self) -> list[AdapterRecord]:
        return [*self._resident, *(record for record, _ in self._installing)]

    def _lack(self, record: AdapterRecord, without: list[AdapterRecord]) -> Lack:
        """What an adapter would lack for a seat if others were gone."""
        num_bytes = self.used_bytes - sum(other.page_bytes for other in without) + record.facts.page_bytes
        missing = self.pages.spare.missing_layers(record.facts.replaced, [other.slot for other in without])
        return Lack(not self._free_slots and not without, num_bytes > self.max_bytes, tuple(missing))

    def _victims(self, record: AdapterRecord) -> list[AdapterRecord] | None:
        """Adapters, least recently used first, each of which leaves room for what is lacking; None if it never fits."""
        victims: list[AdapterRecord] = []
        candidates = sorted(filter(_may_leave, self._resident), key=lambda record: record.age)
        while lack := self._lack(record, victims):
            victim = next((other for other in candidates if self._eases(other, lack)), None)
            if victim is None:
                return None
            candidates.remove(victim)
            victims.append(victim)
        return victims

    def _eases(self, record: AdapterRecord, lack: Lack) -> bool:
        """Whether a resident adapter's leaving brings some of what is lacking; any leaves a slot."""
        if lack.layers:
            return self.pages.spare.holds_any(record.slot, lack.layers)
        return not lack.bytes or record.page_bytes > 0

    def _let_yield(self) -> None:
        """As many adapters as others wait for seats, those that have held theirs longest, beyond the cycle.

        For spare experts of the first one that lacks them it is as many as it takes, of those that hold some.
        One whose requests found no place in a batch yet does not: it would leave with nothing done.
        """
        due = time.monotonic() - self._cycle_seconds
        staying = [
            record for record in self._resident if record.has_run and not (record.is_yielding or record.pinned)
        ]
        staying = [record for record in staying if record.resident_since <= due]
        staying.sort(key=lambda record: record.resident_since)
        num_seats = len(self._wanted)
        wants_experts = next((record for record in self._wanted if record.facts.replaced), None)
        if wants_experts is not None and self._lack(wants_experts, []).layers:
            num_seats = sum(not record.facts.replaced for record in self._wanted)
            self._ask_to_yield(self._enough_for(wants_experts, staying))
        num_yielding = sum(record.is_yielding for record in self._resident)
        staying = [record for record in staying if not record.is_yielding]
        self._ask_to_yield(staying[: max(0, num_seats - num_yielding)])
        if not self._wanted:
            for record in self._resident:
                record.is_yielding = False

    def _ask_to_yield(self, records: list[AdapterRecord]) -> None:
        for record in records:
            record.is_yielding = True
            self._on_change(record)

    def _enough_for(self, record: AdapterRecord, staying: list[AdapterRecord]) -> list[AdapterRecord]:
        """Those whose leaving brings all that it lacks; nobody if that is not enough, for they would idle in vain."""
        leaving = [other for other in self._resident if _may_leave(other) or (other.is_yielding and not other.pinned)]
        chosen: list[AdapterRecord] = []
        for other in staying:
            lack = self._lack(record, leaving + chosen)
            if lack and self._eases(other, lack):
                chosen.append(other)
        return [] if self._lack(record, leaving + chosen) else chosen


def _may_leave(record: AdapterRecord) -> bool:
    if record.pinned or record.num_running:
        return False
    return not record.references or record.is_yielding
