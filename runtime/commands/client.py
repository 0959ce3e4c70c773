"""What the client commands share: channels, and a gRPC error as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runtime.errors import GraftError

DEADLINE_SECONDS = 600.0


@contextmanager
def connect(address: str) -> Iterator[grpc.Channel]:
    """A channel; RPC errors inside become GraftError, with the server's own words."""
    with grpc.insecure_channel(address) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise as_graft_error(error, address) from error


def as_graft_error(error: Any, address: str) -> GraftError:
    """The sentence, the field and the problems that the status carries."""
    status = rpc_status.from_call(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and status is None:
        return GraftError(f"no server answers at {address}", reason="UNREACHABLE")
    field, problems = "", []
    for detail in status.details if status is not None else ():
        bad_request, precondition = error_details_pb2.BadRequest(), error_details_pb2.PreconditionFailure()
        if detail.Unpack(bad_request):
            field = bad_request.field_violations[0].field
        elif detail.Unpack(precondition):
            problems = [violation.description for violation in precondition.violations]
    where = f" ({field})" if field else ""
    return GraftError(f"{error.details()}{where} [{error.code().name}]", reason="RPC", problems=problems)
