"""Who gets a seat on the device when bytes are short: small ones may pass a large one, and nobody waits for ever."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.adapters import device_tier
from runtime.adapters.device_tier import DeviceTier
from runtime.adapters.info import AdapterState
from runtime.adapters.record import AdapterFacts, AdapterRecord
from runtime.adapters.spare_experts import SpareExperts
from tests.conftest import RecordNumber

TICK_SECONDS = 0.25
CYCLE_SECONDS = 1.0
PASSING_SECONDS = 1.0
MAX_RUN_SECONDS = 2.0


class FakePages:
    """Takes no time and no memory."""

    num_bytes = vacant_bytes = 0
    has_young = False

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self.spare = SpareExperts({}, 0, max_slots, torch.device("cpu"))

    def best_slot(self, free_slots: list[int], host: object) -> int:
        return free_slots[-1]

    def install(self, slot: int, host: object, max_bytes: int) -> Iterator[None]:
        yield

    def remove(self, slot: int) -> None:
        pass


@dataclass
class Request:
    record: AdapterRecord
    arrived: float
    run_seconds: float
    began: float = math.inf


@dataclass
class World:
    """A tier on a clock of its own, and requests that hold adapters as the engine lets them."""

    max_bytes: int
    max_slots: int = 4
    passing_seconds: float = PASSING_SECONDS
    now: float = 1000.0
    requests: list[Request] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        pages: object = FakePages(self.max_slots)
        self.tier = DeviceTier(pages, self.max_bytes, CYCLE_SECONDS, self._moved, self.passing_seconds)  # type: ignore[arg-type]

    def monotonic(self) -> float:
        return self.now

    def request(self, record: AdapterRecord, run_seconds: float = 1.0) -> Request:
        record.references += 1
        record.last_used = self.now
        self.tier.want(record)
        self.requests.append(Request(record, self.now, run_seconds))
        return self.requests[-1]

    def tick(self, num_ticks: int = 1) -> None:
        for _ in range(num_ticks):
            self.tier.seat_wanted()
            assert not self.tier.can_seat, "what could have a seat has got one"
            while self.tier.is_installing:
                self.tier.advance()
            for request in self.requests:
                record = request.record
                if request.began == math.inf and record.is_resident and not record.is_yielding:
                    request.began = self.now
                    record.num_running += 1
                    record.has_run = True
            self.now += TICK_SECONDS
            for request in [item for item in self.requests if item.began + item.run_seconds <= self.now]:
                self.requests.remove(request)
                self.waits.append(request.began - request.arrived)
                request.record.num_running -= 1
                request.record.references -= 1
                if not request.record.references:
                    self.tier.unwant(request.record)
            assert self.tier.used_bytes <= self.max_bytes

    def _moved(self, record: AdapterRecord) -> None:
        if record.slot < 0 and record.references:
            self.tier.want(record)


@pytest.fixture
def new_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[World]]:
    class Clocked(World):
        def __post_init__(self) -> None:
            super().__post_init__()
            monkeypatch.setattr(device_tier, "time", self)

    yield Clocked


def adapter(name: str, num_bytes: int, *, pinned: bool = False) -> AdapterRecord:
    host: object = object()
    record = AdapterRecord(name, 1, "", state=AdapterState.READY, pinned=pinned, host=host, created=0.0)  # type: ignore[arg-type]
    record.facts = AdapterFacts(device_bytes=num_bytes)
    return record


def test_a_small_one_passes_a_large_one_that_has_to_wait(new_world: type[World]) -> None:
    world = new_world(10)
    held, large, small = adapter("held", 6), adapter("large", 9), adapter("small", 3)
    world.request(held, 2.0)
    world.tick()
    world.request(large)
    world.request(small, 0.5)
    world.tick()
    assert small.is_resident and not large.is_resident
    world.tick(12)
    assert large.is_resident


def test_after_a_while_nobody_passes_whom_the_first_would_have_to_wait_for(new_world: type[World]) -> None:
    world = new_world(10)
    held, large, late = adapter("held", 6), adapter("large", 9), adapter("late", 3)
    world.request(held, 8.0)
    world.tick()
    world.request(large)
    world.tick(math.ceil(PASSING_SECONDS / TICK_SECONDS))
    world.request(late)
    world.tick()
    assert not late.is_resident and not large.is_resident
    while not large.is_resident:
        assert not late.is_resident
        world.tick()


def test_whom_the_first_need_not_wait_for_may_pass_at_any_time(new_world: type[World]) -> None:
    world = new_world(10)
    held, large, small, other = adapter("held", 6), adapter("large", 6), adapter("small", 3), adapter("other", 2)
    world.request(held, 8.0)
    world.tick()
    world.request(large)
    world.tick(math.ceil(PASSING_SECONDS / TICK_SECONDS) + 1)
    world.request(small, 8.0)
    world.tick()
    assert small.is_resident, "6 and 3 are in 10 together"
    world.request(other, 8.0)
    world.tick()
    assert not other.is_resident, "6, 3 and 2 are not"


def test_the_first_one_does_not_yield_its_slot_to_those_that_pass(new_world: type[World]) -> None:
    world = new_world(100, max_slots=2)
    for name in ("held", "too"):
        world.request(adapter(name, 1), 8.0)
    world.tick()
    first, second = adapter("first", 50), adapter("second", 1)
    for record in (first, second):
        world.request(record)
        world.tick(6)
    while not first.is_resident:
        assert not second.is_resident
        world.tick()


def test_one_that_has_no_room_beside_what_is_pinned_holds_nobody_up(new_world: type[World]) -> None:
    world = new_world(10)
    pinned, held, hopeless, small = (
        adapter("pinned", 4, pinned=True),
        adapter("held", 4),
        adapter("large", 7),
        adapter("small", 5),
    )
    world.request(pinned, 30.0)
    world.request(held, 1.0)
    world.tick()
    world.request(hopeless)
    world.tick(12)
    world.request(small)
    world.tick(2)
    assert small.is_resident and not hopeless.is_resident
    pinned.pinned = False
    world.tick(math.ceil(30.0 / TICK_SECONDS))
    assert hopeless.is_resident


def test_what_is_pinned_while_it_yields_serves_again(new_world: type[World]) -> None:
    world = new_world(10)
    held = adapter("held", 6)
    world.request(held, 6.0)
    world.tick()
    world.request(adapter("other", 6))
    world.tick(8)
    assert held.is_yielding
    held.pinned = True
    world.tick()
    assert not held.is_yielding


def _flood(world: World, num_seconds: float) -> float:
    """How long a large adapter waits among small ones whose requests never cease; infinity if to the end."""
    small = [adapter(f"small {n}", 3) for n in range(4)]
    large = adapter("large", 9)
    since = world.now
    asked: Request | None = None
    while world.now < since + num_seconds:
        for record in small:
            if record.references < 2:
                world.request(record, 1.5)
        if asked is None and world.now >= since + 3.0:
            asked = world.request(large)
        world.tick()
        if asked is not None and asked.began < math.inf:
            return asked.began - asked.arrived
    return math.inf


def test_a_large_one_waits_a_bounded_time_among_small_ones_that_never_cease(
    new_world: type[World], record_number: RecordNumber
) -> None:
    bound_seconds = PASSING_SECONDS + CYCLE_SECONDS + 2 * MAX_RUN_SECONDS
    waited_seconds = _flood(new_world(10), 60.0)
    record_number("a large adapter among small ones: seconds it waits", waited_seconds, at_most=bound_seconds)
    assert _flood(new_world(10, passing_seconds=math.inf), 60.0) == math.inf, "it would starve if all might pass"


Arrival = st.tuples(st.integers(0, 5), st.integers(1, int(MAX_RUN_SECONDS / TICK_SECONDS)))


@given(
    sizes=st.lists(st.integers(1, 10), min_size=6, max_size=6),
    arrivals=st.lists(st.lists(Arrival, max_size=3), max_size=60),
    max_slots=st.integers(1, 4),
    pinned_bytes=st.integers(0, 3),
)
@settings(deadline=None, max_examples=80)
def test_nobody_waits_for_ever_for_a_seat(
    sizes: list[int], arrivals: list[list[tuple[int, int]]], max_slots: int, pinned_bytes: int
) -> None:
    """Each wait is within that of all adapters before it, one after the other, each behind all seats that are held."""
    world = World(10 + pinned_bytes, max_slots + bool(pinned_bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_tier, "time", world)
        records = [adapter(f"a{n}", size) for n, size in enumerate(sizes)]
        if pinned_bytes:
            world.request(adapter("pinned", pinned_bytes, pinned=True))
            world.tick()
        for coming in arrivals:
            for index, num_ticks in coming:
                world.request(records[index], num_ticks * TICK_SECONDS)
            world.tick()
        for _ in range(2000):
            if not world.requests:
                break
            world.tick()
    assert not world.requests and not world.tier.num_wanted
    one_turn_seconds = PASSING_SECONDS + max_slots * (CYCLE_SECONDS + MAX_RUN_SECONDS + TICK_SECONDS)
    assert max(world.waits, default=0.0) <= (len(sizes) + 1) * one_turn_seconds
