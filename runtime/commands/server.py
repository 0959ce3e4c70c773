"""`graft server info|load|drain|abort`, against the admin port of a running server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from runtime.commands.adapters import labelled, table
from runtime.commands.client import DEADLINE_SECONDS, connect
from runtime.pb.graft.admin.v1 import server_pb2 as pb
from runtime.pb.graft.admin.v1.server_pb2_grpc import ServerServiceStub

COLUMNS = ("REQUEST", "CORRELATION", "ADAPTER", "AGE S", "SEQUENCES", "TOKENS")


def run(options: argparse.Namespace) -> int:
    """Do one action and print its result, a line as soon as it is known."""
    with connect(options.admin) as channel:
        for line in _ACTIONS[options.action](ServerServiceStub(channel), options):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return 0


def _info(stub: ServerServiceStub, options: argparse.Namespace) -> Iterator[str]:
    info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=DEADLINE_SECONDS)
    state = pb.GetServerInfoResponse.State.Name(info.state).removeprefix("STATE_")
    rows = [
        ("version", info.version),
        ("state", f"{state}, stalled" if info.stalled else state),
        ("model", info.model_name),
        ("kind", info.model_kind or "-"),
        ("parameters", f"{info.parameter_count:,}"),
        ("device", info.device),
        ("dtype", info.dtype or "-"),
        ("started", info.start_time.ToJsonString()),
        ("max_waiting_requests", str(info.max_waiting_requests)),
        ("max_receive_bytes", str(info.max_receive_bytes)),
        ("max_adapter_requests", _or_no_bound(info.max_adapter_requests)),
        ("max_adapter_tokens", _or_no_bound(info.max_adapter_tokens)),
        ("replacement_experts", str(info.replacement_experts)),
    ]
    rows += [(field.name, f"{value:g}") for field, value in info.limits.ListFields()]
    return labelled(rows)


def _or_no_bound(limit: int) -> str:
    return str(limit) if limit else "no bound"


def _load(stub: ServerServiceStub, options: argparse.Namespace) -> Iterator[str]:
    page = stub.GetLoad(pb.GetLoadRequest(), timeout=DEADLINE_SECONDS)
    first, requests = page, [*page.requests]
    while page.next_page_token:
        page = stub.GetLoad(pb.GetLoadRequest(page_token=page.next_page_token), timeout=DEADLINE_SECONDS)
        requests.extend(page.requests)
    if requests:
        yield from table(COLUMNS, [_row(request) for request in requests])
    wait_seconds = first.estimated_wait.ToMilliseconds() / 1000
    running = f"{first.sequences_running} sequences running ({first.sequences_paused} of them paused)"
    yield f"{running}, {first.sequences_waiting} waiting, about {wait_seconds:.1f} s"
    yield f"{first.kv_tokens_used:,} of {first.kv_tokens_total:,} tokens in the KV cache"
    yield f"{first.adapter_bytes_used:,} of {first.adapter_bytes_limit:,} adapter bytes on the device"
    if first.draining:
        yield "the server is draining"


def _drain(stub: ServerServiceStub, options: argparse.Namespace) -> Iterator[str]:
    request = pb.DrainRequest()
    if options.timeout is not None:
        request.timeout.FromMilliseconds(int(options.timeout * 1000))
    for response in stub.Drain(request):
        phase = pb.DrainResponse.Phase.Name(response.phase).removeprefix("PHASE_")
        yield f"{phase}: {_requests(response.running_request_count)} running"


def _abort(stub: ServerServiceStub, options: argparse.Namespace) -> Iterator[str]:
    request = pb.AbortRequest(
        request_id=options.request,
        correlation_id=options.correlation,
        adapter_id=options.adapter,
        all=options.all or None,  # a false one would be the target as well
    )
    yield f"{_requests(stub.Abort(request, timeout=DEADLINE_SECONDS).aborted_count)} ended"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _row(request: pb.RunningRequest) -> tuple[str, ...]:
    return (
        request.request_id,
        request.correlation_id or "-",
        request.adapter_id or "-",
        f"{request.age.ToMilliseconds() / 1000:.1f}",
        str(request.sequence_count),
        str(request.generated_token_count),
    )


_ACTIONS = {"info": _info, "load": _load, "drain": _drain, "abort": _abort}
