"""From Graft's errors to what gRPC clients read: a code, a sentence, and google.rpc details."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from runtime.errors import ErrorKind, GraftError

DOMAIN = "graft"
DETAILS_KEY = "grpc-status-details-bin"  # the trailer that grpcio-status and other languages read
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # the trailer that gRPC's own retries obey (gRFC A6)
NEVER = "-1"
MAX_MESSAGE_CHARS = 1000
MAX_PROBLEMS_CHARS = 4000  # trailers share an 8 KiB header budget


def code_of(kind: ErrorKind) -> grpc.StatusCode:
    """The status code of an outcome; their names are the same."""
    return grpc.StatusCode[kind.value]


def status_of(error: GraftError) -> status_pb2.Status:
    """The rich status: exactly one ErrorInfo, and what else helps the client to act."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_short(error.message))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.problems:
        violations = [
            error_details_pb2.PreconditionFailure.Violation(type=error.reason, description=problem)
            for problem in _that_fit(error.problems)
        ]
        details.append(error_details_pb2.PreconditionFailure(violations=violations))
    if error.kind is ErrorKind.RESOURCE_EXHAUSTED:
        quota = error_details_pb2.QuotaFailure.Violation(subject=error.reason, description=_short(error.message))
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if error.retry_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(_milliseconds(error.retry_seconds))
        details.append(retry)
    status = status_pb2.Status(code=code_of(error.kind).value[0], message=_short(error.message))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def pushback_of(error: GraftError) -> tuple[tuple[str, str], ...]:
    """What gRPC clients that retry by themselves are told: when, or that waiting does not help.

    UNAVAILABLE without a time says nothing: the client's own backoff decides, and may go to another server.
    """
    if error.kind not in (ErrorKind.RESOURCE_EXHAUSTED, ErrorKind.UNAVAILABLE):
        return ()
    if error.retry_seconds is not None:
        return ((PUSHBACK_KEY, str(_milliseconds(error.retry_seconds))),)
    return ((PUSHBACK_KEY, NEVER),) if error.kind is ErrorKind.RESOURCE_EXHAUSTED else ()


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: GraftError) -> None:
    """End the call with this error; never returns."""
    status = status_of(error)
    ours = (*pushback_of(error), (DETAILS_KEY, status.SerializeToString()))
    trailers = (*(context.trailing_metadata() or ()), *ours)
    await context.abort(code_of(error.kind), status.message, trailers)


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _that_fit(problems: Sequence[str]) -> list[str]:
    fitting: list[str] = []
    room = MAX_PROBLEMS_CHARS
    for index, problem in enumerate(problems):
        short = problem if len(problem) <= 300 else problem[:299] + "…"
        room -= len(short.encode()) + 40
        if room < 0:
            return [*fitting, f"and {len(problems) - index} more"]
        fitting.append(short)
    return fitting


def _short(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"
