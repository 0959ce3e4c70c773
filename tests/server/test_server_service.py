"""graft.admin.v1.ServerService on a live server: what it tells, and ending requests. A step takes 10 ms here."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from runtime.config import EngineConfig, ServerConfig
from runtime.errors import Aborted, Unavailable
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as adapters_pb
from runtime.pb.graft.admin.v1 import server_pb2 as admin_pb
from runtime.server.calls import Call
from runtime.server.drain import Drain
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate
from runtime.server.health import SERVER_SERVICE, Health
from runtime.server.limits import Limits
from runtime.server.metrics import Metrics
from runtime.server.server_service import ServerService
from runtime.version import version
from tests.server.live import DEMO_MODEL, LiveServer, eventually, health, refused

LONG = pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=200, min_new_tokens=200))  # two seconds
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
ABORTED = (grpc.StatusCode.ABORTED, "ABORTED_BY_OPERATOR", "")


@pytest.fixture(scope="module")
def busy(adapters_root: Path) -> Iterator[LiveServer]:
    with LiveServer.fake(adapters_root, step_seconds=0.01) as live:
        live.adapters.LoadAdapter(adapters_pb.LoadAdapterRequest(adapter_id="dates", source_path="dates"))
        yield live


@pytest.fixture(autouse=True)
def quiet(busy: LiveServer) -> Iterator[None]:
    """No test leaves a request running for the next one."""
    yield
    busy.admin.Abort(admin_pb.AbortRequest(all=True))
    assert eventually(lambda: busy.admin.GetLoad(admin_pb.GetLoadRequest()).request_count == 0)


def start(live: LiveServer, correlation_id: str, adapter: str | None = None) -> grpc.Call:
    """A stream of two seconds that has begun."""
    request = pb.SingleGenerationRequest(
        adapter_id=adapter, request=pb.GenerationRequest(text="one two three"), params=LONG
    )
    call = live.generation.GenerateStream(request, timeout=20, metadata=(("x-correlation-id", correlation_id),))
    next(call)
    return call


def request_id(call: grpc.Call) -> str:
    return dict(call.initial_metadata())["x-request-id"]


def load(live: LiveServer, **page: object) -> admin_pb.GetLoadResponse:
    return live.admin.GetLoad(admin_pb.GetLoadRequest(**page), timeout=5)


def abort(live: LiveServer, **target: object) -> int:
    return live.admin.Abort(admin_pb.AbortRequest(**target), timeout=5).aborted_count


def test_the_server_tells_what_it_is_and_every_limit_that_it_has(busy: LiveServer) -> None:
    info = busy.admin.GetServerInfo(admin_pb.GetServerInfoRequest())
    assert (info.version, info.model_name, info.model_kind) == (version(), "model", "deepseek_v3")
    assert (info.state, info.stalled) == (admin_pb.GetServerInfoResponse.STATE_READY, False)
    assert (info.device, info.dtype, info.max_receive_bytes) == ("cpu", "float32", 16 * 2**20)
    assert info.max_waiting_requests == EngineConfig(DEMO_MODEL).max_waiting_requests
    assert 0 < time.time() - info.start_time.ToSeconds() < 600
    limits = dataclasses.asdict(Limits(max_model_len=256))
    assert {field.name: getattr(info.limits, field.name) for field in info.limits.DESCRIPTOR.fields} == limits
    told = busy.generation.ModelInfo(pb.ModelInfoRequest())
    assert (told.max_sequence_length, told.max_new_tokens) == (info.limits.max_model_len, info.limits.max_new_tokens)


async def test_a_server_that_starts_tells_its_state_and_refuses_the_rest() -> None:
    engine = EngineConfig(DEMO_MODEL, replacement_experts=3, max_waiting_requests=40)
    config = ServerConfig(engine, max_adapter_requests=7, max_adapter_tokens=2**40)
    client, gate, checks = EngineClient(config.engine), Gate(), Health()
    drain = Drain(gate, checks, Metrics("model", lambda: client.stats))
    service = ServerService(config, client, gate, checks, drain)
    info = await service.GetServerInfo(admin_pb.GetServerInfoRequest(), None)
    assert info.state == admin_pb.GetServerInfoResponse.STATE_STARTING
    assert not info.HasField("limits") and info.model_kind == ""
    assert (info.max_waiting_requests, info.max_adapter_requests, info.max_adapter_tokens) == (40, 7, 2**40)
    assert info.replacement_experts == 3
    with pytest.raises(Unavailable, match="starting"):
        await service.GetLoad(admin_pb.GetLoadRequest(), None)
    with pytest.raises(Unavailable, match="starting"):
        await anext(aiter(service.Drain(admin_pb.DrainRequest(), None)))


def test_the_load_lists_running_calls_page_by_page_the_oldest_first(busy: LiveServer) -> None:
    calls = [start(busy, f"client-{n}", "dates" if n % 2 else None) for n in range(5)]
    first = load(busy, page_size=2)
    second = load(busy, page_size=2, page_token=first.next_page_token)
    third = load(busy, page_size=2, page_token=second.next_page_token)
    assert [len(page.requests) for page in (first, second, third)] == [2, 2, 1]
    assert third.next_page_token == ""
    rows = [*first.requests, *second.requests, *third.requests]
    assert [row.request_id for row in rows] == [request_id(call) for call in calls]
    assert [row.correlation_id for row in rows] == [f"client-{n}" for n in range(5)]
    assert [row.adapter_id for row in rows] == ["", "dates", "", "dates", ""]
    assert all(row.sequence_count == 1 and row.generated_token_count > 0 for row in rows)
    ages = [row.age.ToMilliseconds() for row in rows]
    assert ages == sorted(ages, reverse=True) and 0 < ages[0] < 2000
    assert (first.sequences_running, first.request_count, first.draining) == (5, 5, False)
    assert (first.kv_tokens_total, first.adapter_bytes_used, first.adapter_bytes_limit) == (4096, 1000, 1 << 30)
    assert eventually(lambda: load(busy).step_count > first.step_count)
    assert eventually(lambda: load(busy).requests[0].generated_token_count > rows[0].generated_token_count)


def test_a_page_goes_on_where_the_last_one_ended_though_its_last_call_has_gone(busy: LiveServer) -> None:
    calls = [start(busy, f"client-{n}") for n in range(3)]
    page = load(busy, page_size=1)
    assert abort(busy, request_id=page.requests[0].request_id) == 1
    assert refused(lambda: list(calls[0])) == ABORTED
    rest = load(busy, page_token=page.next_page_token).requests
    assert [row.correlation_id for row in rest] == ["client-1", "client-2"]


@pytest.mark.parametrize(
    ("page", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"page_size": 1001}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"page_token": "-1"}, "page_token"),
        ({"page_token": "9" * 5000}, "page_token"),
    ],
)
def test_a_page_that_cannot_be_is_refused_by_name(busy: LiveServer, page: dict, field: str) -> None:
    assert refused(lambda: load(busy, **page)) == (*INVALID, field)


def test_an_operator_ends_one_request_and_the_others_go_on(busy: LiveServer) -> None:
    victim, other = start(busy, "victim"), start(busy, "other")
    assert abort(busy, request_id=request_id(victim)) == 1
    assert refused(lambda: list(victim)) == ABORTED
    assert abort(busy, request_id=request_id(victim)) == 0
    assert eventually(lambda: load(busy).sequences_running == 1, 1.0)
    assert list(other)[-1].generated_token_count == 200


def test_an_operator_ends_what_came_with_a_correlation_id_or_for_an_adapter_or_everything(busy: LiveServer) -> None:
    keys = list(itertools.product(("red", "blue"), (None, "dates")))
    for target, doomed in (
        ({"correlation_id": "red"}, [key for key in keys if key[0] == "red"]),
        ({"adapter_id": "dates"}, [key for key in keys if key[1] == "dates"]),
        ({"all": True}, keys),
    ):
        calls = {key: start(busy, *key) for key in keys}
        assert abort(busy, **target) == len(doomed)
        for key in doomed:
            assert refused(lambda call=calls[key]: list(call)) == ABORTED
        assert abort(busy, all=True) == len(keys) - len(doomed)
        assert eventually(lambda: load(busy).sequences_running == 0, 1.0)


def test_a_batch_is_ended_as_one_and_frees_all_its_prompts(busy: LiveServer) -> None:
    request = pb.BatchedGenerationRequest(requests=[pb.GenerationRequest(text="one two")] * 8, params=LONG)
    call = busy.generation.Generate.future(request, timeout=20)
    assert eventually(lambda: load(busy).sequences_running == 8)
    (row,) = load(busy).requests
    assert row.sequence_count == 8
    assert abort(busy, request_id=row.request_id) == 1
    assert refused(call.result) == ABORTED
    assert eventually(lambda: load(busy).sequences_running == 0, 1.0)


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ({}, "target"),
        ({"all": False}, "all"),
        ({"request_id": ""}, "request_id"),
        ({"correlation_id": ""}, "correlation_id"),
        ({"adapter_id": ""}, "adapter_id"),
    ],
)
def test_an_abort_without_a_target_ends_nothing(busy: LiveServer, target: dict, field: str) -> None:
    call = start(busy, "safe")
    assert refused(lambda: abort(busy, **target)) == (*INVALID, field)
    assert next(call).stop_reason == pb.NOT_FINISHED


def test_a_call_that_is_ended_while_it_is_read_does_not_start(busy: LiveServer) -> None:
    call = Call()
    assert call.end(Aborted("ended", reason="ABORTED_BY_OPERATOR"))
    assert not call.end(Aborted("again", reason="ABORTED_BY_OPERATOR"))
    with pytest.raises(Aborted, match="ended"):
        call.attach(None)


def test_the_service_is_named_in_the_admin_ports_health(busy: LiveServer) -> None:
    assert health(busy.admin_channel, SERVER_SERVICE) == health(busy.admin_channel, "")
    with pytest.raises(grpc.RpcError) as caught:
        health(busy.channel, SERVER_SERVICE)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
