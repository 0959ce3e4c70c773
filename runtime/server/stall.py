"""Tells an engine that hangs from one that is slow or idle, without asking it to compute anything."""

from __future__ import annotations

import asyncio
import logging
import time

from runtime.server.engine_client import EngineClient
from runtime.server.health import Health

POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


class StallWatch:
    """The engine is stalled when no step has finished for `stall_seconds` although requests run."""

    def __init__(self, client: EngineClient, health: Health, stall_seconds: float) -> None:
        self._client = client
        self._health = health
        self._stall_seconds = stall_seconds
        self._num_steps = -1
        self._progressed = time.monotonic()

    async def run(self) -> None:
        """Keep health up to date until the engine is dead."""
        while not self._client.dead.done():
            stalled = self.is_stalled()
            if stalled and self._health.is_alive:
                logger.error("the engine is stalled: no step has finished for %g s", self._stall_seconds)
            elif not stalled and not self._health.is_alive:
                logger.info("the engine goes on")
            if stalled is self._health.is_alive:
                await self._health.set_alive(not stalled)
            await asyncio.sleep(min(POLL_SECONDS, self._stall_seconds / 4))

    def is_stalled(self) -> bool:
        """Whether the time is over; to be asked again and again, since it compares with what it saw before."""
        now, num_steps = time.monotonic(), self._client.stats.steps
        if num_steps != self._num_steps or not self._client.is_busy:
            self._num_steps, self._progressed = num_steps, now
        return now - self._progressed > self._stall_seconds
