"""Messages between the processes: what goes in comes out, what is not a message is refused."""

from __future__ import annotations

import socket
from pathlib import Path

import msgpack
import pytest

from runtime.config import EngineConfig
from runtime.engine.messages import (
    AdapterInfo,
    AdapterReply,
    AddRequest,
    CallFailed,
    CallId,
    EngineStats,
    FinishReason,
    RequestId,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    TopToken,
)
from runtime.engine.sampling_params import SamplingParams
from runtime.engine.transport import MAX_FRAME_BYTES, Connection, TransportError, decode, encode
from runtime.errors import ErrorKind

MESSAGES = [
    EngineConfig(Path("models/one"), device="cuda", adapter_memory_gib=2.5),
    AddRequest(RequestId(7), [1, 2, 3], SamplingParams(5, seed=2**64 - 1, temperature=0.5), "a", 12.5),
    AddRequest(RequestId(8), [], SamplingParams(5)),
    StepOutputs(
        [SequenceOutput(RequestId(1), 5, -0.5, 2, [TopToken(5, -0.5)], FinishReason.EOS, 0.25)], EngineStats(running=3)
    ),
    AdapterReply(CallId(2), [AdapterInfo("a", 3, "sha256:x", "READY", target_modules=["q_proj"], warnings=["w"])]),
    CallFailed(CallId(2), ErrorKind.ABORTED, "m", "R", problems=["p"]),
    Shutdown(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_border(message: object) -> None:
    assert decode(encode(message)[4:]) == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgpack.packb("Shutdown"),
        msgpack.packb(["Popen", []]),
        msgpack.packb(["Shutdown", [1]]),
        msgpack.packb(["CancelRequest", ["one"]]),
        msgpack.packb(["CancelRequest", [True]]),
        msgpack.packb(["AddRequest", [1, [1, "2"], [5, 0, 0.0, 0, 1.0, 0, False, 0], None, None]]),
        msgpack.packb(["RequestFailed", [1, "NO_SUCH_KIND", "m", "r", ""]]),
    ],
)
def test_what_is_not_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(TransportError):
        decode(body)


def test_an_endless_frame_is_refused_before_it_is_read() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
        with pytest.raises(TransportError):
            Connection(right).receive()


def test_a_closed_connection_reads_as_none() -> None:
    left, right = socket.socketpair()
    with right:
        Connection(left).send(Shutdown())
        left.close()
        connection = Connection(right)
        assert connection.receive() == Shutdown()
        assert connection.receive() is None
