"""The queues between the engine and a reader."""

from __future__ import annotations

import pytest

from runtime.engine.messages import FinishReason, RequestId, SequenceOutput
from runtime.errors import Exhausted, Unavailable
from runtime.server.engine_client import MAX_QUEUED_OUTPUTS, OutputStream


def make_stream() -> tuple[OutputStream, list[OutputStream]]:
    """A stream, and the list that it enters when it is closed."""
    closed: list[OutputStream] = []
    return OutputStream(RequestId(1), closed.append), closed


async def test_outputs_come_in_order_and_end_with_the_finish_reason() -> None:
    stream, _ = make_stream()
    for token_id in range(3):
        stream.push(SequenceOutput(RequestId(1), token_id, finish_reason=FinishReason.EOS if token_id == 2 else None))
    stream.push(SequenceOutput(RequestId(1), 99))
    assert [output.token_id async for output in stream] == [0, 1, 2]


async def test_a_reader_that_falls_behind_loses_its_own_request_in_bounded_memory() -> None:
    stream, closed = make_stream()
    for token_id in range(MAX_QUEUED_OUTPUTS + 100):
        stream.push(SequenceOutput(RequestId(1), token_id))
    assert closed == [stream]
    received = []
    with pytest.raises(Exhausted) as caught:
        async for output in stream:
            received.append(output.token_id)
    assert caught.value.reason == "SLOW_READER"
    assert received == list(range(MAX_QUEUED_OUTPUTS))


async def test_an_error_ends_the_stream() -> None:
    stream, _ = make_stream()
    stream.push(SequenceOutput(RequestId(1), 5))
    stream.push(Unavailable("gone", reason="DRAINING"))
    received = []
    with pytest.raises(Unavailable):
        async for output in stream:
            received.append(output.token_id)
    assert received == [5]
