"""A watcher that does not read costs a bounded queue, and is told so; others get every change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from runtime.adapters.info import AdapterInfo
from runtime.errors import Exhausted, Unavailable
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub
from runtime.server.adapter_watch import MAX_QUEUED_CHANGES, AdapterWatch
from tests.server.live import LiveServer, eventually, refused
from tests.server.test_backpressure import SMALL_WINDOW

NUM_CHANGES = 6 * MAX_QUEUED_CHANGES
AT_ONCE = 50


def change(generation: int) -> AdapterInfo:
    return AdapterInfo("a", generation, "", "READY")


async def test_changes_come_in_order_behind_the_snapshot() -> None:
    watch = AdapterWatch(max_queued=3)
    watch.change(change(1))
    watch.begin([change(n) for n in range(10)])
    for generation in (10, 11, 12):
        watch.change(change(generation))
    taken = [await watch.take() for _ in range(14)]
    assert [info.generation if info else None for info in taken] == [*range(10), None, 10, 11, 12]


async def test_a_watcher_that_waits_here_meets_what_ended_it() -> None:
    watch = AdapterWatch()
    watch.begin([])
    assert await watch.take() is None
    waiting = asyncio.create_task(watch.take())
    await asyncio.sleep(0)
    watch.end(Unavailable("the engine has stopped", reason="ENGINE_STOPPED"))
    with pytest.raises(Unavailable):
        await waiting
    watch.raise_if_lost()


async def test_a_watcher_that_is_stuck_elsewhere_is_taken_out_and_learns_why() -> None:
    watch = AdapterWatch(max_queued=3)
    stuck = asyncio.Event()

    async def read() -> None:
        assert await watch.take() is None
        try:
            stuck.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            watch.raise_if_lost()
            raise

    reader = asyncio.create_task(read())
    watch.begin([])
    await stuck.wait()
    for generation in range(3):
        watch.change(change(generation))
    await asyncio.sleep(0)
    assert not reader.done()
    for generation in range(5):
        watch.change(change(generation))
        assert not watch._items, "it holds nothing any more"
    with pytest.raises(Exhausted, match="3 changes wait") as caught:
        await reader
    assert caught.value.reason == "WATCHER_TOO_SLOW"


@pytest.fixture
def server(adapters_root: Path) -> Iterator[LiveServer]:
    with LiveServer.fake(adapters_root) as live:
        yield live


def _change_many(live: LiveServer) -> None:
    """Each adapter comes and goes: two changes."""
    for _ in range(NUM_CHANGES // (2 * AT_ONCE)):
        names = [f"a{n}" for n in range(AT_ONCE)]
        loads = [pb.LoadAdapterRequest(adapter_id=name, source_path="dates") for name in names]
        for call in [live.adapters.LoadAdapter.future(load) for load in loads]:
            call.result()
        for call in [live.adapters.UnloadAdapter.future(pb.UnloadAdapterRequest(name=name)) for name in names]:
            call.result()


def test_a_client_that_stops_reading_is_ended_while_another_gets_every_change(server: LiveServer) -> None:
    seen: list[pb.Adapter] = []
    reading = server.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    assert next(reading).snapshot_complete

    def read() -> None:
        for response in reading:
            seen.append(response.adapter)
            if len(seen) == NUM_CHANGES:
                return

    reader = threading.Thread(target=read)
    reader.start()
    with grpc.insecure_channel(server.admin_address, SMALL_WINDOW) as channel:
        stalled = AdapterServiceStub(channel).WatchAdapters(pb.WatchAdaptersRequest())
        assert next(stalled).snapshot_complete
        _change_many(server)
        # The server has let go of it although it still reads nothing.
        assert eventually(lambda: any("WATCHER_TOO_SLOW" in line for line in server.errors), 5.0)
        too_slow = (grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_TOO_SLOW")
        got = []
        assert refused(lambda: got.extend(stalled))[:2] == too_slow
        assert len(got) < NUM_CHANGES - MAX_QUEUED_CHANGES
        again = AdapterServiceStub(channel).WatchAdapters(pb.WatchAdaptersRequest())
        assert next(again).snapshot_complete
    reader.join(20)
    assert len(seen) == NUM_CHANGES
    reading.cancel()
