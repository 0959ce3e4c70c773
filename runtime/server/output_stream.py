"""What the engine made of one request and its reader has not taken yet: bounded in number and in time.

When `max_queued_tokens` wait, the engine is asked to pause the request, and to go on once they are taken: others do not
notice. What waits is taken as a whole and becomes one message, so a reader that was behind catches up at once. A reader
that takes nothing for `slow_reader_seconds` while its request is paused, or has ended, loses it.

In front of this queue stand gRPC's own buffers. How much of an unread stream they accept is for the client to say, not
for the server: its HTTP/2 window, which its library lets grow to several megabytes, and the sockets. Here an unread
stream costs one message inside gRPC and what waits in this queue.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from runtime.engine.messages import PromptScored, RequestId, SequenceOutput
from runtime.errors import Exhausted, GraftError

StreamItem: TypeAlias = SequenceOutput | PromptScored


@dataclass(frozen=True)
class ReaderBounds:
    """How many tokens may wait for one reader, and how long."""

    max_queued_tokens: int = 256
    slow_reader_seconds: float = 30.0


class StreamOwner(Protocol):
    """Who feeds the stream."""

    def pause(self, stream: OutputStream, paused: bool) -> None:
        """Keep its request out of the coming steps, or let it go on."""

    def forget(self, stream: OutputStream) -> None:
        """Send it nothing more; if its request still runs, free it."""


class OutputStream:
    """One request's outputs, for one reader. Must be closed."""

    def __init__(self, request_id: RequestId, owner: StreamOwner, bounds: ReaderBounds) -> None:
        self.request_id = request_id
        self.ended = False  # the engine sends nothing more
        self.adapter = ""  # NAME@GENERATION, once the engine has told
        self._owner = owner
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._items: list[StreamItem] = []
        self._num_queued = 0
        self._failure: GraftError | None = None
        self._arrival: asyncio.Future[None] | None = None  # set while the reader waits here
        self._reader: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None  # set while the reader must hurry
        self._is_paused = False
        self._is_lost = False

    def push(self, output: SequenceOutput) -> None:
        """The next output; after the one with a finish reason, nothing counts any more."""
        if not self.ended:
            self.ended = output.finish_reason is not None
            self._add(output, 1)

    def push_scores(self, scored: PromptScored) -> None:
        """Scores of prompt tokens; each counts as a token that waits."""
        if not self.ended:
            self._add(scored, len(scored.scores))

    def fail(self, error: GraftError) -> None:
        """The request has ended with an error; the reader meets it behind what came before."""
        if not self.ended:
            self.ended = True
            self._failure = error
            self._tell_reader()

    def end(self, error: GraftError) -> None:
        """End the request from this side: the engine frees it; the reader meets the error behind what came before."""
        if not self.ended:
            self._owner.forget(self)
            self.fail(error)

    async def take(self) -> list[StreamItem]:
        """Everything that has come since the last call, in order: one item at least. Raises what ended the request."""
        if not self._items and self._failure is None:
            self._arrival = self._loop.create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        if not self._items and self._failure is not None:
            raise self._failure
        if self._reader is None:
            self._reader = asyncio.current_task()
        if self._timer is not None:
            self._stop_timer()
            self._resume()
        if self.ended:
            self._start_timer()  # the rest is in the reader's hands: it is done when it closes the stream
        items, self._items, self._num_queued = self._items, [], 0
        return items

    def close(self) -> None:
        """Forget the request; if it still runs, the engine frees it."""
        self._stop_timer()
        self._owner.forget(self)
        self.ended = True

    def raise_if_lost(self) -> None:
        """For a reader that was cancelled: raise the reason if its own slowness is it."""
        if self._is_lost and self._failure is not None:
            self._is_lost = False
            if self._reader is not None:
                self._reader.uncancel()
            raise self._failure

    def _add(self, item: StreamItem, num_tokens: int) -> None:
        self._items.append(item)
        self._num_queued += num_tokens
        self._tell_reader()

    def _tell_reader(self) -> None:
        """Wake it if it waits here; else it is busy with what it took before, and may have to hurry."""
        if self._arrival is not None:
            if not self._arrival.done():
                self._arrival.set_result(None)
        elif self._timer is None and (self.ended or self._num_queued >= self._bounds.max_queued_tokens):
            self._start_timer()
            self._pause()

    def _pause(self) -> None:
        if not self.ended:
            self._is_paused = True
            self._owner.pause(self, True)

    def _resume(self) -> None:
        if self._is_paused and not self.ended:
            self._is_paused = False
            self._owner.pause(self, False)

    def _start_timer(self) -> None:
        self._timer = self._loop.call_later(self._bounds.slow_reader_seconds, self._lose)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _lose(self) -> None:
        """The reader is too slow: free what its request holds, and take the reader out of where it is stuck."""
        seconds = self._bounds.slow_reader_seconds
        message = f"the client has read nothing for {seconds:g} s; {self._num_queued} tokens more wait for it"
        self._failure = self._failure or Exhausted(message, reason="SLOW_READER")
        self._items, self._num_queued = [], 0
        self.close()
        if self._reader is not None:
            self._is_lost = True
            self._reader.cancel()
