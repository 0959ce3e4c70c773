"""Errors as gRPC statuses: one ErrorInfo, and the details that help."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from runtime.errors import (
    AlreadyExists,
    Conflict,
    ErrorKind,
    Exhausted,
    GraftError,
    Internal,
    InvalidRequest,
    NotFound,
    Precondition,
    Unavailable,
)
from runtime.server.status import code_of, pushback_of, status_of


def details(error: GraftError) -> dict[str, object]:
    """The details by their message name."""
    found = {}
    for detail in status_of(error).details:
        message = getattr(error_details_pb2, detail.TypeName().rsplit(".", 1)[1])()
        detail.Unpack(message)
        found[type(message).__name__] = message
    return found


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_every_kind_has_a_code(kind: ErrorKind) -> None:
    assert code_of(kind).name == kind.value


@pytest.mark.parametrize(
    "cls", [InvalidRequest, NotFound, AlreadyExists, Conflict, Precondition, Exhausted, Unavailable, Internal]
)
def test_every_error_carries_one_error_info_of_our_domain(cls: type[GraftError]) -> None:
    status = status_of(cls("message", reason="WHY"))
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1
    assert status.code == grpc.StatusCode[cls.kind.value].value[0]
    info = details(cls("message", reason="WHY"))["ErrorInfo"]
    assert (info.reason, info.domain) == ("WHY", "graft")


def test_field_and_retry_delay_are_told() -> None:
    found = details(Exhausted("full", reason="QUEUE_FULL", field="requests", retry_seconds=1.5))
    assert found["BadRequest"].field_violations[0].field == "requests"
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert found["QuotaFailure"].violations[0].subject == "QUEUE_FULL"


def test_every_problem_is_listed_until_the_trailer_is_full() -> None:
    few = details(Precondition("bad", reason="BAD", problems=["one", "two"]))["PreconditionFailure"]
    assert [violation.description for violation in few.violations] == ["one", "two"]
    error = Precondition("bad", reason="BAD", problems=[f"{n}: {'x' * 500}" for n in range(1000)])
    many = details(error)["PreconditionFailure"].violations
    assert many[-1].description == f"and {1000 - (len(many) - 1)} more"
    assert status_of(error).ByteSize() < 6000


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Exhausted("full", reason="QUEUE_FULL", retry_seconds=1.5), "1500"),
        (Exhausted("slow", reason="WATCHER_TOO_SLOW", retry_seconds=0.0), "0"),
        (Exhausted("large", reason="ADAPTER_MEMORY_FULL"), "-1"),
        (Unavailable("starting", reason="STARTING", retry_seconds=1.0), "1000"),
        (Unavailable("draining", reason="DRAINING"), None),
        (InvalidRequest("wrong", reason="INVALID_PARAMETER", retry_seconds=1.0), None),
    ],
    ids=lambda value: getattr(value, "reason", value),
)
def test_clients_that_retry_by_themselves_are_told_when_never_or_nothing(error: GraftError, told: str | None) -> None:
    assert dict(pushback_of(error)).get("grpc-retry-pushback-ms") == told
