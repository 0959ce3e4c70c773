"""The engine's process and its client, without a front-end around them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from runtime.config import EngineConfig
from runtime.engine.messages import AddRequest, CancelRequest, EngineFailed, EngineReady, RequestId, Shutdown
from runtime.engine.sampling_params import SamplingParams
from runtime.engine.transport import Connection
from runtime.env import child_environment
from runtime.errors import Internal, Unavailable
from runtime.server.engine_client import EngineClient
from tests.server.live import DEMO_MODEL

FAKE_ENGINE = "tests.server.fake_engine:FakeEngine"
CONFIG = EngineConfig(DEMO_MODEL)


def start_process() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    command = [sys.executable, "-m", "runtime.engine.process", str(theirs.fileno()), FAKE_ENGINE]
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=child_environment())
    return process, Connection(ours)


def test_the_process_serves_ignores_ctrl_c_and_ends_when_told() -> None:
    process, connection = start_process()
    connection.send(CONFIG)
    assert isinstance(connection.receive(), EngineReady)
    process.send_signal(signal.SIGINT)  # a terminal sends Ctrl-C to both processes: the front-end alone decides
    connection.send(AddRequest(RequestId(1), [5, 6, 7], SamplingParams(max_new_tokens=2)))
    outputs = [output for _ in range(2) for output in connection.receive().outputs]
    assert [output.token_id for output in outputs] == [6, 7]
    assert outputs[-1].finish_reason is not None
    connection.send(Shutdown())
    assert process.wait(5) == 0
    connection.close()


def test_the_process_ends_when_the_front_end_goes_away() -> None:
    process, connection = start_process()
    connection.send(CONFIG)
    assert isinstance(connection.receive(), EngineReady)
    connection.close()
    assert process.wait(5) == 0


@pytest.mark.parametrize(
    ("max_model_len", "message", "has_trace"),
    [(13, "RuntimeError: no luck with 13 tokens", True), (14, "max_model_len = 14 is out of range", False)],
)
def test_a_failing_start_is_told_with_a_trace_only_if_it_is_a_defect(
    capfd: pytest.CaptureFixture[str], max_model_len: int, message: str, has_trace: bool
) -> None:
    process, connection = start_process()
    connection.send(EngineConfig(DEMO_MODEL, max_model_len=max_model_len))
    assert connection.receive() == EngineFailed(message)
    assert process.wait(5) == 1
    assert ("Traceback" in capfd.readouterr().err) == has_trace
    connection.close()


def test_freed_requests_show_in_the_stats_without_another_step() -> None:
    process, connection = start_process()
    connection.send(CONFIG)
    connection.receive()
    connection.send(AddRequest(RequestId(1), [5, 6], SamplingParams(max_new_tokens=10**9, min_new_tokens=10**9)))
    assert connection.receive().stats.running == 1
    connection.send(CancelRequest(RequestId(1)))
    while (event := connection.receive()).outputs:
        pass
    assert event.stats.running == 0
    connection.close()
    process.wait(5)


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    """A started client; it is stopped afterwards, dead or alive."""
    client = EngineClient(CONFIG, FAKE_ENGINE)
    await client.start()
    yield client
    await client.stop()


async def test_a_killed_engine_fails_what_runs_and_refuses_what_comes(client: EngineClient) -> None:
    stream = client.add([5, 6], SamplingParams(max_new_tokens=10**9, min_new_tokens=10**9), None, None)
    await stream.take()
    os.kill(client._process.pid, signal.SIGKILL)
    with pytest.raises(Internal):
        while True:
            await stream.take()
    assert await asyncio.wait_for(asyncio.shield(client.dead), 5) == "the engine process ended"
    with pytest.raises(Unavailable):
        client.add([5], SamplingParams(max_new_tokens=1), None, None)
    with pytest.raises(Unavailable):
        await client.list_adapters()


async def test_a_closed_stream_is_cancelled_in_the_engine(client: EngineClient) -> None:
    stream = client.add([5, 6], SamplingParams(max_new_tokens=10**9, min_new_tokens=10**9), None, None)
    await stream.take()
    assert client.stats.running == 1
    stream.close()
    for _ in range(100):
        if client.stats.running == 0:
            break
        await asyncio.sleep(0.02)
    assert client.stats.running == 0


async def test_an_engine_that_cannot_start_is_told_in_one_sentence() -> None:
    client = EngineClient(EngineConfig(DEMO_MODEL, max_model_len=13), FAKE_ENGINE)
    with pytest.raises(Internal, match="the engine did not start: RuntimeError: no luck with 13 tokens"):
        await client.start()
    await client.stop()
