"""Which adapters are on the device: a bounded number of slots and bytes, given in the order in which they are wanted.

Who is wanted longest is seated first. While there is no room for it, one that came later and takes less may pass: at
any time if the first one will not have to wait for it, because it still fits beside all that have passed it and all
that are pinned, and otherwise as long as the first one has waited for less than `passing_seconds`. So a large adapter
waits for those that were there before it, or came a moment later, and small ones need not wait for it.

A seat is taken from the adapter that was used least recently, never from one that is pinned or that requests hold; for
spare experts it is one that holds some. When no seat can be had so, adapters that have held theirs for longer than the
cycle yield, as many as are waited for, and more if the first one needs the bytes or experts of more: their waiting
requests do not begin, and when the running ones have ended they give up their seats and queue again, so that adapters
that share too few slots take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from runtime.adapters.compaction import Compaction
from runtime.adapters.device_pages import DevicePages
from runtime.adapters.record import AdapterRecord

PASSING_SECONDS = 2.0
# Of those that wait, so many are looked at when there is room: a step must not take longer the more adapters wait.
MAX_LOOKED_AT = 64


@dataclass(frozen=True)
class Lack:
    """What is lacking for a seat: a slot, bytes of pages, or spare experts in these layers. False if nothing is."""

    slot: bool
    bytes: bool
    layers: tuple[int, ...]

    def __bool__(self) -> bool:
        return self.slot or self.bytes or bool(self.layers)


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
        self.compaction = Compaction(pages)
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
        record.slot = self.pages.best_slot(self._free_slots, record.host)
        self._free_slots.remove(record.slot)
        record.seated_since = time.monotonic()
        self._installing.append((record, self.pages.install(record.slot, record.host, self.max_bytes)))
        self.compaction.stop()
        return True

    def advance(self) -> tuple[AdapterRecord, Exception | None] | None:
        """Copy a piece; returns the adapter that is complete now, or that could not be copied, with the reason."""
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
        """Whether one that waits could have a seat now."""
        return self._next_to_seat() is not None

    def seat_wanted(self) -> None:
        """Give seats to those that wait and may have one, oldest first."""
        self._seat_all()
        self._let_yield()
        self._seat_all()  # who yields and has nothing running leaves at once

    def _seat_all(self) -> None:
        while (record := self._next_to_seat()) is not None and self.seat(record, evict=True):
            pass

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

    def _next_to_seat(self) -> AdapterRecord | None:
        """The oldest of those that wait for which there is room, and that may pass the first of them."""
        first = self._first_in_line()
        leaving = list(filter(_may_leave, self._resident))
        if first is None or not (self._free_slots or leaving):
            return None
        room = self.max_bytes - self.used_bytes + sum(record.page_bytes for record in leaving)
        bytes_to_pass, experts_beside = self._room_to_pass(first)
        for record in islice(self._wanted, MAX_LOOKED_AT):
            replaced, num_bytes = record.facts.replaced, record.facts.page_bytes
            if record is not first:
                if replaced and not self.pages.spare.could_hold([*experts_beside, replaced]):
                    continue
                num_bytes += max(0, room - bytes_to_pass)
            if num_bytes <= room and self._victims(record) is not None:
                return record
        return None

    def _first_in_line(self) -> AdapterRecord | None:
        """The oldest of those that wait, but for one that cannot have a seat beside those that are pinned now."""
        pinned = [record for record in self._seated() if record.pinned]
        room = self.max_bytes - sum(record.page_bytes for record in pinned)
        if len(pinned) >= self.pages.max_slots:
            return None
        experts = [record.facts.replaced for record in pinned]
        for record in self._wanted:
            replaced = record.facts.replaced
            if record.facts.page_bytes <= room and (
                not replaced or self.pages.spare.could_hold([*experts, replaced])
            ):
                return record
        return None

    def _room_to_pass(self, first: AdapterRecord) -> tuple[int, list[Mapping[int, int]]]:
        """The bytes that one may take that passes the first, so that this will not have to wait for it, and the spare
        experts of those beside which its own must find room. The bytes are below 0 if there is no slot for it.
        """
        since = self._wanted[first]
        if time.monotonic() - since < self._passing_seconds:
            return self.max_bytes, []
        beside = [other for other in self._seated() if other.pinned or other.seated_since >= since]
        if len(beside) + 2 > self.pages.max_slots:
            return -1, []
        num_bytes = self.max_bytes - first.facts.page_bytes - sum(other.page_bytes for other in beside)
        return num_bytes, [other.facts.replaced for other in (*beside, first)]

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
        """As many adapters as others wait for seats, or as the first needs, those that have held theirs longest.

        Where the first lacks spare experts, those come first that hold some, and others only for those that need none.
        Only beyond the cycle, and none whose requests found no place in a batch yet: it would leave with nothing done.
        """
        first = self._first_in_line()
        for record in self._resident:
            record.is_yielding &= first is not None and not record.pinned
        if first is None:
            return
        leaving = [record for record in self._resident if record.is_yielding or _may_leave(record)]
        lack = self._lack(first, leaving)
        num_seats = sum(not (lack.layers and record.facts.replaced) for record in self._wanted)
        num_yielding = sum(record.is_yielding for record in self._resident)
        due = time.monotonic() - self._cycle_seconds
        staying = [record for record in self._resident if record.has_run and not record.pinned]
        staying = [record for record in staying if record.resident_since <= due and not record.is_yielding]
        staying.sort(key=lambda record: (not self._eases(record, lack), record.resident_since))
        for record in staying:
            lack = self._lack(first, leaving)
            if num_yielding >= num_seats and not (lack and self._eases(record, lack)):
                continue
            if record not in leaving:
                leaving.append(record)
            record.is_yielding = True
            num_yielding += 1
            self._on_change(record)


def _may_leave(record: AdapterRecord) -> bool:
    if record.pinned or record.num_running:
        return False
    return not record.references or record.is_yielding
