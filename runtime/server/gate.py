"""Whether calls are taken: starting, ready or draining, and which generation calls are inside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from runtime.errors import Unavailable
from runtime.server.calls import Call


class ServerState(StrEnum):
    """What an operator sees from outside."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"


class Gate:
    """Every call that needs the model passes here; draining waits until nothing is inside.

    `left_at` is the monotonic time, in seconds, at which the last call left.
    """

    def __init__(self) -> None:
        self.state = ServerState.STARTING
        self.left_at = 0.0
        self._inside: dict[str, Call] = {}
        self._left = asyncio.Event()

    @property
    def calls(self) -> list[Call]:
        """The calls inside, the oldest first."""
        return list(self._inside.values())

    @property
    def num_inside(self) -> int:
        """How many calls are inside."""
        return len(self._inside)

    def check(self) -> None:
        """Raise Unavailable unless calls are taken; clients may retry, elsewhere or later."""
        if self.state is ServerState.STARTING:
            raise Unavailable("the server is starting", reason="STARTING", retry_seconds=1.0)
        if self.state is ServerState.DRAINING:
            raise Unavailable("the server is draining and takes no new calls", reason="DRAINING")

    @contextmanager
    def enter(self, call: Call) -> Iterator[None]:
        """List a call while it is inside."""
        self.check()
        self._inside[call.request_id] = call
        try:
            yield
        finally:
            del self._inside[call.request_id]
            self.left_at = time.monotonic()
            self._left.set()
            self._left = asyncio.Event()

    async def wait_left(self, timeout_seconds: float) -> None:
        """Return when a call leaves, at the latest after the timeout. It misses none that leaves after it is called."""
        try:
            await asyncio.wait_for(self._left.wait(), timeout_seconds)
        except TimeoutError:
            return
