"""Health in its three states: alive, ready, draining; and an engine that hangs."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import server_pb2 as admin_pb
from tests.conftest import RecordNumber
from tests.server.live import LiveServer, eventually, health

READY = "fmaas.GenerationService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
STALL_SECONDS = 0.5
LONG = {"max_new_tokens": 200, "min_new_tokens": 200}
NUM_STREAMS = 300


@pytest.fixture(scope="module")
def brief(adapters_root: Path) -> Iterator[LiveServer]:
    """Its engine counts as stalled after half a second."""
    with LiveServer.fake(adapters_root, f"stall_seconds={STALL_SECONDS}", step_seconds=0.01) as live:
        yield live


@contextmanager
def frozen_engine(live: LiveServer) -> Iterator[None]:
    """The engine process does nothing meanwhile."""
    pid = live.process.pid
    (engine,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


def states(live: LiveServer) -> tuple[int, int]:
    """Alive and ready."""
    return health(live.channel, ""), health(live.channel, READY)


def test_an_engine_that_hangs_is_told_by_health_until_it_goes_on(brief: LiveServer) -> None:
    call = brief.stream("abc", stopping=LONG)
    next(call)
    with frozen_engine(brief):
        assert eventually(lambda: states(brief) == (NOT_SERVING, NOT_SERVING))
        assert health(brief.admin_channel, "") == NOT_SERVING
        assert brief.get("/healthz") == (503, "engine stalled\n") == brief.get("/readyz")
        assert brief.admin.GetServerInfo(admin_pb.GetServerInfoRequest()).stalled
    assert eventually(lambda: states(brief) == (SERVING, SERVING))
    assert brief.get("/healthz")[0] == 200
    assert list(call)[-1].generated_token_count == 200
    assert not brief.admin.GetServerInfo(admin_pb.GetServerInfoRequest()).stalled


def test_an_idle_engine_is_well_and_one_that_does_not_take_a_request_is_not(brief: LiveServer) -> None:
    with frozen_engine(brief):
        time.sleep(3 * STALL_SECONDS)
        assert states(brief) == (SERVING, SERVING)
        running = brief.generation.Generate.future(pb.BatchedGenerationRequest(requests=[{"text": "abc"}]), timeout=20)
        assert eventually(lambda: states(brief) == (NOT_SERVING, NOT_SERVING))
    assert running.result().responses[0].text == "abc"
    assert eventually(lambda: states(brief) == (SERVING, SERVING))


def watch(live: LiveServer, service: str) -> tuple[grpc.Call, queue.Queue[int]]:
    """A Watch call, and the states that it has told."""
    call = health_pb2_grpc.HealthStub(live.channel).Watch(health_pb2.HealthCheckRequest(service=service))
    told: queue.Queue[int] = queue.Queue()

    def read() -> None:
        try:
            for response in call:
                told.put(response.status)
        except grpc.RpcError:
            told.put(-1)

    threading.Thread(target=read, daemon=True).start()
    return call, told


def test_an_unknown_name_is_not_found_by_check_and_watched_for_in_case_it_comes(server: LiveServer) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health(server.channel, "nobody.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    call, told = watch(server, "nobody.Service")
    assert told.get(timeout=5) == UNKNOWN
    with pytest.raises(queue.Empty):
        told.get(timeout=0.5)
    assert call.is_active()
    call.cancel()


def test_health_answers_beside_many_streams_costs_the_engine_no_step_and_tells_watchers_of_a_drain(
    adapters_root: Path, record_number: RecordNumber
) -> None:
    with LiveServer.fake(adapters_root, step_seconds=0.05) as live:
        calls = [live.stream("abc", stopping=LONG) for _ in range(NUM_STREAMS)]
        with ThreadPoolExecutor(NUM_STREAMS) as readers:
            list(readers.map(next, calls))
            assert live.admin.GetLoad(admin_pb.GetLoadRequest()).request_count == NUM_STREAMS
            slowest = 0.0
            for _ in range(20):
                began = time.monotonic()
                assert states(live) == (SERVING, SERVING)
                slowest = max(slowest, time.monotonic() - began)
            for call in calls:
                call.cancel()
        record_number(f"health: slowest answer beside {NUM_STREAMS} streams, s", slowest, at_most=2.0)
        assert eventually(lambda: live.admin.GetLoad(admin_pb.GetLoadRequest()).sequences_running == 0)
        before = live.admin.GetLoad(admin_pb.GetLoadRequest()).step_count
        for _ in range(50):
            assert states(live) == (SERVING, SERVING)
        assert live.admin.GetLoad(admin_pb.GetLoadRequest()).step_count == before > 0
        _watch_a_drain(live)


def _watch_a_drain(live: LiveServer) -> None:
    """A watcher is told; the process is still alive and the server's own service still answers."""
    call, told = watch(live, READY)
    assert told.get(timeout=5) == SERVING
    list(live.admin.Drain(admin_pb.DrainRequest()))
    assert told.get(timeout=5) == NOT_SERVING
    assert states(live) == (SERVING, NOT_SERVING)
    assert health(live.admin_channel, "graft.admin.v1.AdapterService") == NOT_SERVING
    assert health(live.admin_channel, "graft.admin.v1.ServerService") == SERVING
    call.cancel()
