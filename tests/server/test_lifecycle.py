"""Deadlines, cancellation, draining and death. One step of the fake engine takes 10 ms here."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from tests.server.live import LiveServer, eventually, health, refused

STEP_SECONDS = 0.01
LONG = {"max_new_tokens": 200, "min_new_tokens": 200}  # two seconds


@pytest.fixture(scope="module")
def slow(adapters_root: Path) -> Iterator[LiveServer]:
    with LiveServer.fake(adapters_root, step_seconds=STEP_SECONDS) as live:
        yield live


@pytest.fixture
def doomed(adapters_root: Path) -> Iterator[LiveServer]:
    with LiveServer.fake(adapters_root, "drain_timeout_seconds=20.0", step_seconds=STEP_SECONDS) as live:
        yield live


def test_a_time_limit_ends_a_request_normally_with_what_it_has(slow: LiveServer) -> None:
    response = slow.generate("abc", stopping={**LONG, "time_limit_millis": 300})
    assert response.stop_reason == pb.TIME_LIMIT
    assert 5 < response.generated_token_count < 50
    assert response.text.startswith("abcabc")


def test_a_cancelled_stream_is_freed_at_once(slow: LiveServer) -> None:
    call = slow.stream("abc", stopping=LONG)
    next(call)
    assert eventually(lambda: slow.metric("graft_requests_running") == 1)
    call.cancel()
    assert eventually(lambda: slow.metric("graft_requests_running") == 0, 1.0)
    assert eventually(lambda: slow.metric('graft_request_failures_total{code="CANCELLED"') >= 1)


def test_a_client_deadline_frees_every_request_of_its_batch(slow: LiveServer) -> None:
    request = pb.BatchedGenerationRequest(
        requests=[pb.GenerationRequest(text="abc")] * 8, params=pb.Parameters(stopping=pb.StoppingCriteria(**LONG))
    )
    with pytest.raises(grpc.RpcError) as caught:
        slow.generation.Generate(request, timeout=0.4)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(lambda: slow.metric("graft_requests_running") == 0, 1.0)


def test_a_closed_channel_frees_a_unary_request(slow: LiveServer) -> None:
    channel = grpc.insecure_channel(slow.address)
    stub = type(slow.generation)(channel)
    request = pb.BatchedGenerationRequest(
        requests=[pb.GenerationRequest(text="abc")], params=pb.Parameters(stopping=pb.StoppingCriteria(**LONG))
    )
    running = stub.Generate.future(request)
    assert eventually(lambda: slow.metric("graft_requests_running") == 1)
    channel.close()
    assert running.code() is grpc.StatusCode.CANCELLED
    assert eventually(lambda: slow.metric("graft_requests_running") == 0, 1.0)


def test_a_stop_sequence_frees_the_rest_of_the_request(slow: LiveServer) -> None:
    response = slow.generate("one two", stopping={**LONG, "min_new_tokens": 0, "stop_sequences": ["wo"]})
    assert response.stop_reason == pb.STOP_SEQUENCE
    assert eventually(lambda: slow.metric("graft_requests_running") == 0, 1.0)


def test_health_names_each_service_on_its_own_port(slow: LiveServer) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", "fmaas.GenerationService"):
        assert health(slow.channel, name) == serving
    for name in ("", "graft.admin.v1.AdapterService"):
        assert health(slow.admin_channel, name) == serving
    with pytest.raises(grpc.RpcError) as caught:
        health(slow.channel, "graft.admin.v1.AdapterService")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_sigterm_lets_running_requests_finish_refuses_new_ones_and_exits_0(doomed: LiveServer) -> None:
    call = doomed.stream("abc", stopping=LONG)
    received = [next(call), next(call)]
    doomed.process.send_signal(signal.SIGTERM)
    assert eventually(
        lambda: health(doomed.channel, "fmaas.GenerationService") == health_pb2.HealthCheckResponse.NOT_SERVING
    )
    assert health(doomed.channel, "") == health_pb2.HealthCheckResponse.SERVING
    assert refused(lambda: doomed.generate("abc"))[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    load = admin_pb.LoadAdapterRequest(adapter_id="a", source_path="dates")
    assert refused(lambda: doomed.adapters.LoadAdapter(load))[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert doomed.get("/readyz") == (503, "draining\n")
    assert doomed.get("/healthz")[0] == 200
    assert doomed.metric("graft_draining") == 1
    received.extend(call)
    assert received[-1].generated_token_count == 200
    assert received[-1].stop_reason == pb.MAX_TOKENS
    assert doomed.process.wait(10) == 0


def test_a_second_sigterm_ends_running_requests_at_once(doomed: LiveServer) -> None:
    call = doomed.stream("abc", stopping={"max_new_tokens": 1000, "min_new_tokens": 200}, truncate_input_tokens=50)
    next(call)
    doomed.process.send_signal(signal.SIGTERM)
    assert eventually(lambda: doomed.metric("graft_draining") == 1)
    doomed.process.send_signal(signal.SIGTERM)
    assert refused(lambda: list(call))[:2] == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPED")
    assert doomed.process.wait(5) == 0


def test_an_engine_that_fails_ends_its_requests_and_the_server_exits_1(doomed: LiveServer) -> None:
    call = doomed.stream("abc", stopping=LONG)
    next(call)
    load = admin_pb.LoadAdapterRequest(adapter_id="a", source_path="crash")
    code, reason, _ = refused(lambda: doomed.adapters.LoadAdapter(load))
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "ENGINE_STOPPED")
    assert refused(lambda: list(call))[:2] == (grpc.StatusCode.INTERNAL, "ENGINE_STOPPED")
    assert doomed.process.wait(10) == 1
    assert "fell off the bus" in "".join(doomed.errors)


def test_a_taken_port_is_told_in_one_sentence(adapters_root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1:{port}"):
            LiveServer.fake(adapters_root, f"grpc_port={port}").__enter__()


def test_the_front_end_and_the_commands_import_no_torch() -> None:
    modules = "runtime.cli, runtime.server.server, runtime.commands.generate, runtime.commands.adapters"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
