"""Messages between the processes: what goes in comes out, what is not a message is refused."""

from __future__ import annotations

import dataclasses
import enum
import socket
import types
import typing
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from runtime.engine.transport import MAX_FRAME_BYTES, Connection, Message, TransportError, decode, encode
from runtime.errors import ErrorKind

MESSAGES = [
    EngineConfig(Path("models/one"), device="cuda", adapter_memory_gib=2.5),
    AddRequest(RequestId(7), [1, 2, 3], SamplingParams(5, seed=2**64 - 1, temperature=0.5), "a", 12.5),
    AddRequest(RequestId(8), [], SamplingParams(5)),
    StepOutputs(
        [SequenceOutput(RequestId(1), 5, -0.5, 2, [TopToken(5, -0.5)], FinishReason.EOS, 0.25)], EngineStats(running=3)
    ),
    AdapterReply(CallId(2), [AdapterInfo("a", 3, "sha256:x", "READY", target_modules=["q_proj"], warnings=["w"])]),
    CallFailed(CallId(2), ErrorKind.ABORTED, "m", "R", problems=["p"], retry_seconds=0.5),
    Shutdown(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_border(message: object) -> None:
    assert decode(encode(message)[4:]) == message


def values_of(annotation: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Any value of an annotated type."""
    if isinstance(annotation, typing.NewType):
        return values_of(annotation.__supertype__)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=5)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        return st.builds(
            annotation, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(annotation)}
        )
    if issubclass(annotation, enum.Enum):
        return st.sampled_from(annotation)
    plain = {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        Path: st.text("abc/", min_size=1).map(Path),
        types.NoneType: st.none(),
    }
    return plain[annotation] if annotation in plain else st.from_type(annotation)


@pytest.mark.parametrize("kind", typing.get_args(Message), ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_message_survives_the_border(kind: type, data: st.DataObject) -> None:
    message = data.draw(values_of(kind))
    decoded = decode(encode(message)[4:])
    assert decoded == message and type(decoded) is kind


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
        msgpack.packb(["StepOutputs", [[1], [2], []]]),
        msgpack.packb(["StepOutputs", [[1], [2, 3], [], [0] * 10]]),
        msgpack.packb(["StepOutputs", [["1"], [2], [], [0] * 10]]),
        msgpack.packb(["StepOutputs", [[1], [2.0], [], [0] * 10]]),
        msgpack.packb(["StepOutputs", [[1], [2], [], [0] * 9]]),
        msgpack.packb(["StepOutputs", [[1], [2], [[1, [1, 2, 0.0, 0, [], None, None]]], [0] * 10]]),
        msgpack.packb(["StepOutputs", [[1], [2], [[-1, [1, 2, 0.0, 0, [], None, None]]], [0] * 10]]),
        msgpack.packb(["StepOutputs", [[1], [2], [[0, [1, 2, 0.0, 0, [], "tired", None]]], [0] * 10]]),
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
