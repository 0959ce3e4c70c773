"""What every generation call passes before it costs anything: identity, gate, a deadline that can be met, quotas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc

from runtime.adapters.expression import parse_expression
from runtime.errors import DeadlineExceeded
from runtime.server.adapter_quotas import BASE, AdapterQuotas, Places
from runtime.server.calls import Call, correlation_id_of
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Admission:
    """The way in for generation calls; raises Unavailable, InvalidRequest, DeadlineExceeded or Exhausted."""

    def __init__(self, client: EngineClient, gate: Gate, quotas: AdapterQuotas) -> None:
        self._client = client
        self._gate = gate
        self._quotas = quotas

    @contextmanager
    def enter(self, context: Context) -> Iterator[Call]:
        """A call that is listed while it is inside.

        Its ids and its adapter's generation go back as trailing metadata. Nothing is sent before the first message, so
        that a client may still retry what is refused here.
        """
        call = Call(correlation_id_of(context.invocation_metadata() or ()))
        try:
            with self._gate.enter(call):
                yield call
        finally:
            context.set_trailing_metadata(call.metadata)

    @contextmanager
    def places(self, context: Context, adapter: str | None, num_requests: int) -> Iterator[Places]:
        """Places in the server for all requests of a call, whose adapter (an expression, None: the base) is known."""
        names = frozenset({BASE})
        if adapter is not None:
            names = frozenset(self._client.adapter_named(term.reference) for term in parse_expression(adapter))
        wait_seconds = self._client.stats.estimated_wait_seconds * self._quotas.share_of_queue(names)
        check_deadline(context.time_remaining(), wait_seconds)
        with self._quotas.enter(names, num_requests, wait_seconds) as places:
            yield places


def check_deadline(remaining_seconds: float | None, estimated_wait_seconds: float) -> None:
    """Refuse at once what would run out of time while it waits; None means that there is no deadline."""
    if remaining_seconds is not None and remaining_seconds <= estimated_wait_seconds:
        message = (
            f"the deadline is {remaining_seconds:.3f} s away, and a new request waits for about "
            f"{estimated_wait_seconds:.3f} s: give it more time, or send it elsewhere"
        )
        raise DeadlineExceeded(message, reason="DEADLINE_TOO_SHORT")
