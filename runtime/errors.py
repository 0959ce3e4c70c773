"""The errors that Graft raises on purpose, one class per outcome a client can act on."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class ErrorKind(StrEnum):
    """What went wrong, named as gRPC names it; the server maps each to a status code in one place."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    ABORTED = "ABORTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class GraftError(Exception):
    """An expected failure: `reason` is a stable UPPER_SNAKE word, `field` the request field at fault, if any.

    After `retry_seconds` the same call may succeed. None: nothing is known of that, and for a bound that was reached,
    that it will not by waiting.
    """

    kind = ErrorKind.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        field: str = "",
        problems: Sequence[str] = (),
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.problems = tuple(problems)
        self.retry_seconds = retry_seconds


class InvalidRequest(GraftError):
    """A parameter, prompt or option that this server does not take."""

    kind = ErrorKind.INVALID_ARGUMENT


class NotFound(GraftError):
    """Something named in the request does not exist here."""

    kind = ErrorKind.NOT_FOUND


class AlreadyExists(GraftError):
    """The name is taken by other bytes."""

    kind = ErrorKind.ALREADY_EXISTS


class Conflict(GraftError):
    """Another operation on the same thing is under way, or the expected generation is not the live one."""

    kind = ErrorKind.ABORTED


class Aborted(GraftError):
    """An operator ended the request."""

    kind = ErrorKind.ABORTED


class DeadlineExceeded(GraftError):
    """The time that the caller gave is over, or will be before anything can be done."""

    kind = ErrorKind.DEADLINE_EXCEEDED


class Precondition(GraftError):
    """The request is well formed but the file, the base or the server's set-up does not allow it."""

    kind = ErrorKind.FAILED_PRECONDITION


class Exhausted(GraftError):
    """A bound was reached; the message carries the numbers."""

    kind = ErrorKind.RESOURCE_EXHAUSTED


class Unavailable(GraftError):
    """The server is starting, draining or has lost its engine."""

    kind = ErrorKind.UNAVAILABLE


class Internal(GraftError):
    """A defect or a device fault; details go to the log, never to the client."""

    kind = ErrorKind.INTERNAL


_CLASSES: dict[ErrorKind, type[GraftError]] = {
    cls.kind: cls
    for cls in (
        InvalidRequest,
        NotFound,
        AlreadyExists,
        Conflict,
        DeadlineExceeded,
        Precondition,
        Exhausted,
        Unavailable,
        Internal,
    )
}


def error_of_kind(
    kind: ErrorKind,
    message: str,
    *,
    reason: str,
    field: str,
    problems: Sequence[str] = (),
    retry_seconds: float | None = None,
) -> GraftError:
    """Rebuild an error that crossed a process border as plain data."""
    error_class = _CLASSES.get(kind, Internal)
    return error_class(message, reason=reason, field=field, problems=problems, retry_seconds=retry_seconds)
