"""What every generation call passes before it costs anything: identity, the gate, a deadline that can be met."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc

from runtime.errors import DeadlineExceeded
from runtime.server.calls import Call, correlation_id_of
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Admission:
    """The way in for generation calls; raises Unavailable, InvalidRequest or DeadlineExceeded."""

    def __init__(self, client: EngineClient, gate: Gate) -> None:
        self._client = client
        self._gate = gate

    @contextmanager
    def enter(self, context: Context) -> Iterator[Call]:
        """A call that is listed while it is inside.

        Its ids and its adapter's generation go back as trailing metadata. Nothing is sent before the first message, so
        that a client may still retry what is refused here.
        """
        call = Call(correlation_id_of(context.invocation_metadata() or ()))
        try:
            with self._gate.enter(call):
                check_deadline(context.time_remaining(), self._client.stats.estimated_wait_seconds)
                yield call
        finally:
            context.set_trailing_metadata(call.metadata)


def check_deadline(remaining_seconds: float | None, estimated_wait_seconds: float) -> None:
    """Refuse at once what would run out of time while it waits; None means that there is no deadline."""
    if remaining_seconds is not None and remaining_seconds <= estimated_wait_seconds:
        message = (
            f"the deadline is {remaining_seconds:.3f} s away, and a new request waits for about "
            f"{estimated_wait_seconds:.3f} s: give it more time, or send it elsewhere"
        )
        raise DeadlineExceeded(message, reason="DEADLINE_TOO_SHORT")
