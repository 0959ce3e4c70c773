"""What counts as an engine that hangs, told from the engine's own numbers."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from runtime.config import EngineConfig
from runtime.engine.messages import EngineStats
from runtime.server.engine_client import EngineClient
from runtime.server.health import Health
from runtime.server.stall import StallWatch
from tests.server.live import DEMO_MODEL

STALL_SECONDS = 10.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


async def test_only_running_requests_without_a_step_are_a_stall(clock: Callable[[float], None]) -> None:
    client = EngineClient(EngineConfig(DEMO_MODEL))
    watch = StallWatch(client, Health(), STALL_SECONDS)
    told = []
    for stats in (
        EngineStats(),
        EngineStats(waiting=3),  # for an adapter that is being loaded
        EngineStats(running=2, paused=2, steps=5),  # for readers
        EngineStats(running=2, paused=1, steps=5),
        EngineStats(running=2, paused=1, steps=6),
        EngineStats(steps=6),
    ):
        client.stats = stats
        told.append(watch.is_stalled())
        clock(STALL_SECONDS + 1)
        told.append(watch.is_stalled())
    assert told == [False, False] * 3 + [False, True, False, True, False, False]


async def test_a_long_step_is_no_stall_until_the_time_is_over(clock: Callable[[float], None]) -> None:
    client = EngineClient(EngineConfig(DEMO_MODEL))
    watch = StallWatch(client, Health(), STALL_SECONDS)
    client.stats = EngineStats(running=1, steps=1)
    assert not watch.is_stalled()
    clock(STALL_SECONDS - 1)
    assert not watch.is_stalled()
    clock(2)
    assert watch.is_stalled()
