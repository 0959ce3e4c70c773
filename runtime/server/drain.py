"""Taking the server out of traffic without losing a text: begun by SIGTERM or by an operator, never undone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

from runtime.errors import DeadlineExceeded, Unavailable
from runtime.server.gate import Gate, ServerState
from runtime.server.health import Health
from runtime.server.metrics import Metrics

REPORT_SECONDS = 1.0
# gRPC answers a call that it has not handed over when the ports close with CANCELLED, which clients do not retry. Who
# got the last text may ask again at once, so for so long a call is still answered, with UNAVAILABLE.
LINGER_SECONDS = 0.2

logger = logging.getLogger(__name__)


class Drain:
    """New calls are refused from the beginning on; running ones are waited for."""

    def __init__(self, gate: Gate, health: Health, metrics: Metrics) -> None:
        self._gate = gate
        self._health = health
        self._metrics = metrics
        self._began = 0.0

    async def begin(self) -> bool:
        """Take no new calls from now on; False if that was so already."""
        if self._gate.state is ServerState.DRAINING:
            return False
        self._gate.state = ServerState.DRAINING
        self._began = time.monotonic()
        self._metrics.set_draining(True)
        logger.info("draining, calls running: %d", self._gate.num_inside)
        await self._health.set_ready(False)
        return True

    async def watch(self, timeout_seconds: float) -> AsyncGenerator[int, None]:
        """How many calls still run: now, every second and at every change, until none does.

        Raises DeadlineExceeded if some still run when the time is over.
        """
        end = time.monotonic() + timeout_seconds
        while num_running := self._gate.num_inside:
            yield num_running
            left = end - time.monotonic()
            if left <= 0:
                message = f"still running after {timeout_seconds:g} s: {num_running} of the calls; the drain goes on"
                raise DeadlineExceeded(message, reason="DRAIN_TIMEOUT")
            await self._gate.wait_left(min(REPORT_SECONDS, left))

    async def finish(self, delay_seconds: float, timeout_seconds: float, skip: asyncio.Event) -> None:
        """Wait for running calls, and until `delay_seconds` after the drain began; at most for `timeout_seconds`.

        Calls that still run then, or when `skip` is set, end with Unavailable.
        """
        now = time.monotonic()
        end = now + timeout_seconds
        report = now + REPORT_SECONDS
        skipped = asyncio.create_task(skip.wait())
        try:
            while not skip.is_set() and now < (until := self._until(delay_seconds, end)):
                waiting = asyncio.create_task(self._gate.wait_left(min(report, until) - now))
                await asyncio.wait((waiting, skipped), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                now = time.monotonic()
                if now >= report:
                    logger.info("draining, calls running: %d", self._gate.num_inside)
                    report = now + REPORT_SECONDS
        finally:
            skipped.cancel()
        if calls := self._gate.calls:
            logger.warning("ending calls that did not finish in time: %d", len(calls))
            for call in calls:
                call.end(Unavailable("the server stopped before the end", reason="SERVER_STOPPED"))

    def _until(self, delay_seconds: float, end: float) -> float:
        """When to stop, as things are: at `end` while calls run, sooner if none does."""
        if self._gate.num_inside:
            return end
        return min(max(self._began + delay_seconds, self._gate.left_at + LINGER_SECONDS), end)
