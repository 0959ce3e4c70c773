"""Which adapters are on the device: a bounded number of slots and bytes, given in the order in which they are wanted.

Who is wanted longest is seated first. While there is no room for it, one that came later and takes less may pass: at
any time if the first one will not have to wait for it, because it still fits beside all that have passed it and all
that are pinned, and otherwise as long as the first one has waited for less than `passing_seconds`. So a large adapter
waits for those that were there before it, or came a moment later, and small ones need not wait for it.

A seat is taken from the adapter that was used least recently, never from one that is pinned or that requests hold. When
no seat can be had so, adapters that have held theirs for longer than the cycle yield, as many as are waited for, and
more if the first one needs the bytes of more: their waiting requests do not begin, and when the running ones have ended
they give up their seats and queue again, so that adapters that share too few slots take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.record import AdapterRecord

PASSING_SECONDS = 2.0
# Of those that wait, so many are looked at when there is room: a step must not take longer the more adapters wait.
MAX_LOOKED_AT = 64


@dataclass
class TierCounts:
    """How often a request found its adapter there, how often one came in, and how often one had to leave."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class DeviceTier:
    """Slots, pages and who waits for them. `on_change` hears of every adapter that came, left, or has to yield."""

    def __init__(
        self,
        pages: DevicePages,
        max_bytes: int,
        cycle_seconds: float,
        on_change: Callable[[AdapterRecord], None],
        passing_seconds: float = PASSING_SECONDS,
    ) -> None:
        self.pages = pages
        self.max_bytes = max_bytes
        self.counts = TierCounts()
        self._cycle_seconds = cycle_seconds
        self._passing_seconds = passing_seconds
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
        record.slot = self._free_slots.pop()
        record.seated_since = time.monotonic()
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
        return self._next_to_seat() is not None

    def seat_wanted(self) -> None:
        """Give seats to those that wait and may have one, oldest first."""
        while (record := self._next_to_seat()) is not None and self.seat(record, evict=True):
            pass
        self._let_yield()

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

    def _next_to_seat(self) -> AdapterRecord | None:
        """The oldest of those that wait for which there is room, and that may pass the first of them."""
        first = self._first_in_line()
        leaving = list(filter(_may_leave, self._resident))
        if first is None or not (self._free_slots or leaving):
            return None
        room = self.max_bytes - self.used_bytes + sum(record.device_bytes for record in leaving)
        room_to_pass = min(room, self._room_to_pass(first))
        for record in islice(self._wanted, MAX_LOOKED_AT):
            num_bytes = record.facts.device_bytes
            may_have = num_bytes <= (room if record is first else room_to_pass)
            if may_have and self._victims(num_bytes) is not None:
                return record
        return None

    def _first_in_line(self) -> AdapterRecord | None:
        """The oldest of those that wait, but for one that cannot have a seat beside those that are pinned now."""
        pinned = [record for record in self._seated() if record.pinned]
        room = self.max_bytes - sum(record.device_bytes for record in pinned)
        if len(pinned) >= self.pages.max_slots:
            return None
        return next((record for record in self._wanted if record.facts.device_bytes <= room), None)

    def _room_to_pass(self, first: AdapterRecord) -> int:
        """The bytes that one may take that passes the first, so that this will not have to wait for it."""
        since = self._wanted[first]
        if time.monotonic() - since < self._passing_seconds:
            return self.max_bytes
        beside = [other for other in self._seated() if other.pinned or other.seated_since >= since]
        if len(beside) + 2 > self.pages.max_slots:
            return 0
        return self.max_bytes - first.facts.device_bytes - sum(other.device_bytes for other in beside)

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
        """As many adapters as others wait for seats, or as the first needs, those that have held theirs longest.

        Only beyond the cycle, and none whose requests found no place in a batch yet: it would leave with nothing done.
        """
        first = self._first_in_line()
        for record in self._resident:
            record.is_yielding &= first is not None and not record.pinned
        if first is None:
            return
        leaving = [record for record in self._resident if record.is_yielding or _may_leave(record)]
        room = self.max_bytes - self.used_bytes + sum(record.device_bytes for record in leaving)
        num_yielding = sum(record.is_yielding for record in self._resident)
        due = time.monotonic() - self._cycle_seconds
        staying = [record for record in self._resident if record.has_run and not record.pinned]
        for record in sorted(staying, key=lambda record: record.resident_since):
            is_enough = num_yielding >= len(self._wanted) and first.facts.device_bytes <= room
            if is_enough or record.resident_since > due:
                break
            if record.is_yielding:
                continue
            room += record.device_bytes if record not in leaving else 0
            record.is_yielding = True
            num_yielding += 1
            self._on_change(record)


def _may_leave(record: AdapterRecord) -> bool:
    if record.pinned or record.num_running:
        return False
    return not record.references or record.is_yielding
