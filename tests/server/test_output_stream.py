"""What waits between the engine and a reader: in order, in bounds, and not for ever."""

from __future__ import annotations

import asyncio

import pytest

from runtime.engine.messages import FinishReason, PromptScored, RequestId, SequenceOutput, TokenScore
from runtime.errors import Exhausted, Unavailable
from runtime.server.output_stream import OutputStream, ReaderBounds, StreamItem

ID = RequestId(1)
SLOW = 0.05


class Owner:
    """Notes what the stream asks for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pause(self, stream: OutputStream, paused: bool) -> None:
        self.asked.append("pause" if paused else "resume")

    def forget(self, stream: OutputStream) -> None:
        self.asked.append("forget" if stream.ended else "free")


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
async def stream(owner: Owner) -> OutputStream:
    return OutputStream(ID, owner, ReaderBounds(max_queued_tokens=4, slow_reader_seconds=SLOW))


def push(stream: OutputStream, *token_ids: int, last: bool = False) -> None:
    for token_id in token_ids:
        is_last = last and token_id == token_ids[-1]
        stream.push(SequenceOutput(ID, token_id, finish_reason=FinishReason.EOS if is_last else None))


def tokens(items: list[StreamItem]) -> list[int]:
    return [item.token_id for item in items]


async def test_a_waiting_reader_gets_what_comes_and_what_came_together_comes_together(stream: OutputStream) -> None:
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    push(stream, 1)
    assert tokens(await taking) == [1]
    push(stream, 2, 3, last=True)
    push(stream, 99)
    assert tokens(await stream.take()) == [2, 3]
    stream.close()


async def test_an_error_comes_behind_the_outputs_before_it(stream: OutputStream, owner: Owner) -> None:
    push(stream, 5)
    stream.fail(Unavailable("gone", reason="DRAINING"))
    push(stream, 6)
    assert tokens(await stream.take()) == [5]
    for _ in range(2):
        with pytest.raises(Unavailable):
            await stream.take()
    stream.close()
    assert owner.asked == ["forget"]


async def test_an_error_wakes_a_waiting_reader(stream: OutputStream) -> None:
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    stream.fail(Unavailable("gone", reason="DRAINING"))
    with pytest.raises(Unavailable):
        await taking
    stream.close()


async def test_a_full_queue_pauses_its_request_once_and_taking_lets_it_go_on(
    stream: OutputStream, owner: Owner
) -> None:
    push(stream, 1, 2, 3)
    assert owner.asked == []
    push(stream, 4, 5)  # the engine had this one under way
    assert owner.asked == ["pause"]
    assert tokens(await stream.take()) == [1, 2, 3, 4, 5]
    assert owner.asked == ["pause", "resume"]
    stream.close()
    assert owner.asked == ["pause", "resume", "free"]


async def test_a_request_that_ends_while_it_is_paused_is_not_resumed(stream: OutputStream, owner: Owner) -> None:
    push(stream, 1, 2, 3, 4, 5, last=True)
    await stream.take()
    stream.close()
    assert owner.asked == ["pause", "forget"]


async def test_prompt_scores_count_and_a_chunk_of_them_does_not_pause_a_reader_that_waits(
    stream: OutputStream, owner: Owner
) -> None:
    scored = PromptScored(ID, [TokenScore(-0.5, 1)] * 9)
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    stream.push_scores(scored)
    assert await taking == [scored]
    assert owner.asked == []
    stream.push_scores(scored)
    assert owner.asked == ["pause"]
    push(stream, 1)
    assert await stream.take() == [scored, SequenceOutput(ID, 1)]
    stream.close()


async def stuck_reader(stream: OutputStream, num_taken: list[int]) -> None:
    """Takes once and gets stuck with it, as in writing to a client that does not read."""
    try:
        num_taken.append(len(await stream.take()))
        await asyncio.sleep(20)
    except asyncio.CancelledError:
        stream.raise_if_lost()
        raise
    finally:
        stream.close()


@pytest.mark.parametrize(
    ("first", "then", "asked"),
    [
        pytest.param([1], [2, 3, 4, 5], ["pause", "free", "forget"], id="while its queue is full"),
        pytest.param([1], [2], ["forget", "forget"], id="with the end of the request waiting"),
        pytest.param([1], [], ["forget", "forget"], id="with the end of the request in its hands"),
    ],
)
async def test_a_reader_that_takes_nothing_for_too_long_is_freed_from_where_it_is_stuck(
    stream: OutputStream, owner: Owner, first: list[int], then: list[int], asked: list[str]
) -> None:
    num_taken: list[int] = []
    push(stream, *first, last=not then)
    reading = asyncio.create_task(stuck_reader(stream, num_taken))
    await asyncio.sleep(0)
    push(stream, *then, last=len(then) == 1)
    with pytest.raises(Exhausted, match=f"read nothing for {SLOW:g} s; {len(then)} tokens") as caught:
        await asyncio.wait_for(reading, 5)
    assert caught.value.reason == "SLOW_READER"
    assert num_taken == [1]
    assert owner.asked == asked
    assert reading.cancelling() == 0


async def test_a_reader_that_is_stuck_when_its_request_is_ended_is_freed_with_that_error(stream: OutputStream) -> None:
    push(stream, 1)
    reading = asyncio.create_task(stuck_reader(stream, []))
    await asyncio.sleep(0)
    stream.end(Unavailable("gone", reason="DRAINING"))
    with pytest.raises(Unavailable):
        await asyncio.wait_for(reading, 5)


async def test_a_reader_that_is_cancelled_by_somebody_else_is_just_cancelled(stream: OutputStream) -> None:
    push(stream, 1)
    reading = asyncio.create_task(stuck_reader(stream, []))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_a_reader_that_takes_now_and_then_is_not_lost(stream: OutputStream) -> None:
    for _ in range(6):
        push(stream, 1, 2, 3, 4)
        await asyncio.sleep(0.6 * SLOW)
        assert len(await stream.take()) == 4
    stream.close()


async def test_a_queue_that_is_not_full_may_wait(stream: OutputStream) -> None:
    push(stream, 1, 2, 3)
    await asyncio.sleep(2 * SLOW)
    assert len(await stream.take()) == 3
    stream.close()


async def test_nothing_more_is_queued_for_a_lost_reader(stream: OutputStream) -> None:
    push(stream, 1, 2, 3, 4)
    await asyncio.sleep(2 * SLOW)
    push(stream, 5)
    with pytest.raises(Exhausted):
        await stream.take()
