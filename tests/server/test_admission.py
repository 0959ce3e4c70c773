"""The way in: ids that come back, deadlines that cannot be met, and refusals that a client may retry."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runtime.errors import DeadlineExceeded, InvalidRequest
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import server_pb2 as admin_pb
from runtime.server.admission import check_deadline
from runtime.server.calls import MAX_CORRELATION_ID_CHARS, correlation_id_of
from tests.server.live import REPOSITORY, LiveServer, refused

MINTED = re.compile(r"[0-9a-f]{32}")
WAIT_SECONDS = 3.0
LONG = pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=200, min_new_tokens=200))


def batch(text: str = "abc", adapter: str | None = None) -> pb.BatchedGenerationRequest:
    return pb.BatchedGenerationRequest(adapter_id=adapter, requests=[pb.GenerationRequest(text=text)])


def single(text: str = "abc", adapter: str | None = None, **fields: object) -> pb.SingleGenerationRequest:
    return pb.SingleGenerationRequest(adapter_id=adapter, request=pb.GenerationRequest(text=text), **fields)


def sent(correlation_id: str) -> tuple[tuple[str, str], ...]:
    return (("x-correlation-id", correlation_id),)


def ids(metadata: object) -> dict[str, str]:
    return {key: value for key, value in metadata or () if key.startswith("x-")}


def test_every_call_gets_an_id_of_its_own_and_its_correlation_id_back(server: LiveServer) -> None:
    seen = set()
    for n in range(3):
        _, call = server.generation.Generate.with_call(batch(), timeout=20, metadata=sent(f"order {n}"))
        back = ids(call.trailing_metadata())
        assert back["x-correlation-id"] == f"order {n}" and MINTED.fullmatch(back["x-request-id"])
        seen.add(back["x-request-id"])
    assert len(seen) == 3
    _, call = server.generation.Generate.with_call(batch(), timeout=20)
    assert set(ids(call.trailing_metadata())) == {"x-request-id"}


def test_a_stream_tells_its_ids_before_its_first_message_and_at_its_end(server: LiveServer) -> None:
    call = server.generation.GenerateStream(single(), timeout=20, metadata=sent("order"))
    next(call)
    first = ids(call.initial_metadata())
    assert first["x-correlation-id"] == "order" and MINTED.fullmatch(first["x-request-id"])
    list(call)
    assert ids(call.trailing_metadata()) == first


@pytest.mark.parametrize("text", ["abc", "abc " * 5000])
def test_a_refused_call_tells_its_ids_and_the_reason_but_sends_no_headers(server: LiveServer, text: str) -> None:
    call = server.generation.GenerateStream(single(text, "nobody"), timeout=20, metadata=sent("order"))
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert not ids(call.initial_metadata())
    back = ids(call.trailing_metadata())
    assert back["x-correlation-id"] == "order" and MINTED.fullmatch(back["x-request-id"])
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(caught.value).details)


def test_of_several_correlation_ids_the_last_counts(server: LiveServer) -> None:
    metadata = (*sent("first"), *sent("last"))
    _, call = server.generation.Generate.with_call(batch(), timeout=20, metadata=metadata)
    assert ids(call.trailing_metadata())["x-correlation-id"] == "last"


@pytest.mark.parametrize("correlation_id", ["", "x" * (MAX_CORRELATION_ID_CHARS + 1)])
def test_a_correlation_id_that_is_none_is_refused_and_the_next_call_is_answered(
    server: LiveServer, correlation_id: str
) -> None:
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "CORRELATION_ID_INVALID", "x-correlation-id")
    metadata = sent(correlation_id)
    assert refused(lambda: server.generation.Generate(batch(), timeout=20, metadata=metadata)) == expected
    assert refused(lambda: list(server.generation.GenerateStream(single(), timeout=20, metadata=metadata))) == expected
    longest = sent("x" * MAX_CORRELATION_ID_CHARS)
    assert server.generation.Generate(batch(), timeout=20, metadata=longest).responses[0].text == "abc"


@pytest.mark.parametrize("value", [b"bytes", "line\nbreak", "tab\t", "\x7f", "é", "", "x" * 129])
def test_a_correlation_id_is_printable_ascii_whatever_a_client_sends(value: str | bytes) -> None:
    with pytest.raises(InvalidRequest, match="1 to 128 printable ASCII characters"):
        correlation_id_of([("user-agent", "a"), ("x-correlation-id", value)])
    assert correlation_id_of([("x-correlation-id", "~ !"), ("user-agent", "a")]) == "~ !"
    assert correlation_id_of([("user-agent", "a")]) == ""


@pytest.fixture(scope="module")
def queued(adapters_root: Path) -> Iterator[LiveServer]:
    """A new request waits three seconds for each that runs, if one believes the engine."""
    with LiveServer.fake(adapters_root, step_seconds=0.01, wait_seconds=WAIT_SECONDS) as live:
        yield live


def test_a_deadline_nearer_than_the_queues_wait_is_refused_at_once(queued: LiveServer) -> None:
    running = queued.generation.GenerateStream(single(params=LONG))
    next(running)
    began = time.monotonic()
    expected = (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT", "")
    assert refused(lambda: queued.generation.Generate(batch(), timeout=WAIT_SECONDS - 1)) == expected
    assert refused(lambda: list(queued.generation.GenerateStream(single(), timeout=WAIT_SECONDS - 1))) == expected
    assert time.monotonic() - began < 1.0
    assert queued.generation.Generate(batch(), timeout=WAIT_SECONDS + 10).responses[0].text == "abc"
    assert queued.generation.Generate(batch()).responses[0].text == "abc"
    running.cancel()


@pytest.mark.parametrize(
    ("remaining_seconds", "estimated_wait_seconds", "is_met"),
    [(None, 1e9, True), (0.001, 0.0, True), (0.0, 0.0, False), (1.0, 1.0, False), (1.0, 1.1, False), (1.1, 1.0, True)],
)
def test_a_deadline_is_met_if_it_is_later_than_the_wait(
    remaining_seconds: float | None, estimated_wait_seconds: float, is_met: bool
) -> None:
    if is_met:
        check_deadline(remaining_seconds, estimated_wait_seconds)
    else:
        with pytest.raises(DeadlineExceeded, match="deadline is"):
            check_deadline(remaining_seconds, estimated_wait_seconds)


def test_grpcs_own_retry_policy_retries_what_a_draining_server_refuses(adapters_root: Path) -> None:
    """It does so only if the server has sent no headers, so the attempts that it counts prove that."""
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = json.dumps({"methodConfig": [{"name": [{"service": "fmaas.GenerationService"}], "retryPolicy": policy}]})
    with LiveServer.fake(adapters_root) as live:
        assert list(live.admin.Drain(admin_pb.DrainRequest()))[-1].phase == admin_pb.DrainResponse.PHASE_COMPLETE
        with grpc.insecure_channel(live.address, options=[("grpc.service_config", config)]) as channel:
            stub = type(live.generation)(channel)
            unary, stream = (
                lambda: stub.Generate(batch(), timeout=20),
                lambda: list(stub.GenerateStream(single(), timeout=20)),
            )
            for attempts, call in ((4, unary), (8, stream)):
                assert refused(call)[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert live.metric('graft_request_failures_total{code="UNAVAILABLE"') == attempts


def test_the_sample_service_config_leads_clients_away_from_a_draining_server(adapters_root: Path) -> None:
    text = (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8")
    config = text.split("```json\n")[1].split("```")[0]
    starting = [LiveServer.fake(adapters_root) for _ in range(2)]
    with starting[0] as leaving, starting[1] as staying:
        target = f"ipv4:{leaving.address},{staying.address}"
        with grpc.insecure_channel(target, options=[("grpc.service_config", config)]) as channel:
            stub = type(leaving.generation)(channel)
            for _ in range(20):
                stub.Generate(batch(), timeout=20, wait_for_ready=True)
            assert all(live.metric("graft_request_success_total") > 0 for live in (leaving, staying))
            list(leaving.admin.Drain(admin_pb.DrainRequest()))
            before = staying.metric("graft_request_success_total")
            for _ in range(20):
                assert stub.Generate(batch(), timeout=20).responses[0].text == "abc"
            assert staying.metric("graft_request_success_total") == before + 20
