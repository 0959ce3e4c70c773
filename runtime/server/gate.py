"""Whether calls are taken: starting, ready or draining, and how many generation calls are inside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from runtime.errors import Unavailable


class ServerState(StrEnum):
    """What an operator sees from outside."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"


class Gate:
    """Every call that needs the model passes here; draining waits until it is empty."""

    def __init__(self) -> None:
        self.state = ServerState.STARTING
        self.num_inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def check(self) -> None:
        """Raise Unavailable unless calls are taken; clients may retry, elsewhere or later."""
        if self.state is ServerState.STARTING:
            raise Unavailable("the server is starting", reason="STARTING", retry_seconds=1.0)
        if self.state is ServerState.DRAINING:
            raise Unavailable("the server is draining and takes no new calls", reason="DRAINING")

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a call while it is inside."""
        self.check()
        self.num_inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.num_inside -= 1
            if self.num_inside == 0:
                self._empty.set()

    async def wait_empty(self) -> None:
        """Return when no call is inside."""
        await self._empty.wait()
