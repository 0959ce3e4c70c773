"""One adapter's flood is refused at its bound, with numbers and a time, and takes no place of the others."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import Exhausted
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from runtime.server.adapter_quotas import BASE, AdapterQuotas
from tests.server.live import LiveServer, eventually, refused

A, B, SUM = frozenset({"a"}), frozenset({"b"}), frozenset({"a", "b"})


def test_a_full_adapter_refuses_with_the_numbers_and_when_to_come_back() -> None:
    quotas = AdapterQuotas(3, 0)
    with quotas.enter(A, 2, 0.0), pytest.raises(Exhausted) as caught, quotas.enter(A, 2, 4.5):
        pass
    assert (caught.value.reason, caught.value.retry_seconds) == ("ADAPTER_REQUESTS_FULL", 4.5)
    assert "adapter 'a' has 2 requests in the server, and this call would add 2; one adapter may have 3" in str(
        caught.value
    )


@pytest.mark.parametrize(("wait_seconds", "told_seconds"), [(0.0, 1.0), (7.0, 7.0), (1e6, 30.0)])
def test_the_time_to_come_back_is_that_of_the_queue_within_bounds(wait_seconds: float, told_seconds: float) -> None:
    quotas = AdapterQuotas(1, 0)
    with quotas.enter(A, 1, 0.0), pytest.raises(Exhausted) as caught, quotas.enter(A, 1, wait_seconds):
        pass
    assert caught.value.retry_seconds == told_seconds


def test_what_alone_is_over_the_bound_is_told_that_waiting_does_not_help() -> None:
    quotas = AdapterQuotas(3, 100)
    with pytest.raises(Exhausted, match=r"adapter 'a' has 0 requests.*send fewer") as caught:
        quotas.enter(A, 4, 0.0).__enter__()
    assert caught.value.retry_seconds is None
    with quotas.enter(A, 1, 0.0) as places, pytest.raises(Exhausted, match="101") as caught:
        places.add_tokens([50, 51])
    assert (caught.value.reason, caught.value.retry_seconds) == ("ADAPTER_TOKENS_FULL", None)


def test_a_call_gets_places_for_all_its_requests_or_none() -> None:
    quotas = AdapterQuotas(4, 100)
    with quotas.enter(A, 2, 0.0) as first:
        first.add_tokens([40, 40])
        with quotas.enter(A, 2, 0.0) as second:
            with pytest.raises(Exhausted):
                second.add_tokens([10, 11])
            second.add_tokens([10, 10])
        first.end_one(40)
        with quotas.enter(A, 3, 0.0) as third:
            third.add_tokens([20, 20, 20])
            assert (third.num_requests, third.num_tokens) == (3, 60)


def test_a_sum_takes_a_place_of_each_of_its_parts_and_nothing_if_one_is_full() -> None:
    quotas = AdapterQuotas(2, 0)
    with quotas.enter(B, 1, 0.0), quotas.enter(SUM, 1, 0.0):
        with pytest.raises(Exhausted, match="adapter 'b'"):
            quotas.enter(SUM, 1, 0.0).__enter__()
        with quotas.enter(A, 1, 0.0), pytest.raises(Exhausted, match="adapter 'a'"):
            quotas.enter(A, 1, 0.0).__enter__()


def test_zero_is_no_bound() -> None:
    quotas = AdapterQuotas(0, 0)
    with quotas.enter(A, 10**6, 0.0) as places:
        places.add_tokens([10**9])


def test_the_base_is_no_adapter_and_has_no_bound_but_counts_among_those_that_take_turns() -> None:
    quotas, base = AdapterQuotas(2, 10), frozenset({BASE})
    with quotas.enter(base, 100, 0.0) as places:
        places.add_tokens([1000] * 100)
        assert quotas.share_of_queue(A) == 2 / 100
        with quotas.enter(A, 2, 0.0), pytest.raises(Exhausted, match="adapter 'a' has 2 requests"):
            quotas.enter(A, 1, 0.0).__enter__()
        places.end_one(1000)
        assert (places.num_requests, places.num_tokens) == (99, 99_000)
    assert not quotas._uses


def test_a_request_of_an_adapter_without_others_expects_a_small_part_of_the_queues_wait() -> None:
    quotas = AdapterQuotas(0, 0)
    assert quotas.share_of_queue(A) == 1.0
    with quotas.enter(A, 100, 0.0):
        assert quotas.share_of_queue(A) == 1.0
        assert quotas.share_of_queue(B) == 2 / 100
        with quotas.enter(B, 9, 0.0):
            assert quotas.share_of_queue(B) == 20 / 109


Step = st.tuples(
    st.sampled_from([A, B, SUM]), st.integers(0, 4), st.lists(st.integers(1, 40), max_size=4), st.booleans()
)


@given(steps=st.lists(Step, max_size=20))
@settings(deadline=None, max_examples=60)
def test_no_adapter_ever_has_more_than_its_bound_and_nothing_is_left(
    steps: list[tuple[frozenset[str], int, list[int], bool]],
) -> None:
    quotas = AdapterQuotas(5, 80)
    calls: list[tuple[frozenset[str], int, int]] = []
    with ExitStack() as stack:
        for names, num_requests, tokens, ends_one in steps:
            used = Counter({"a": 0, "b": 0})
            used_tokens = Counter(used)
            for other, count, sum_of_tokens in calls:
                for name in other:
                    used[name] += count
                    used_tokens[name] += sum_of_tokens
            fits = all(used[name] + num_requests <= 5 for name in names) or not num_requests
            try:
                places = stack.enter_context(quotas.enter(names, num_requests, 0.0))
                assert fits
            except Exhausted:
                assert not fits
                continue
            tokens = tokens[:num_requests]
            fits = all(used_tokens[name] + sum(tokens) <= 80 for name in names) or not tokens
            try:
                places.add_tokens(tokens)
                assert fits
            except Exhausted:
                assert not fits
                tokens = []
            if ends_one and tokens:
                places.end_one(tokens.pop())
                num_requests -= 1
            calls.append((names, num_requests, sum(tokens)))
    assert not quotas._uses


@pytest.fixture(scope="module")
def bounded(adapters_root: Path) -> Iterator[LiveServer]:
    """Four requests and 500 tokens for each adapter; steps of 10 ms; `dates` has an alias."""
    settings = ("max_adapter_requests=4", "max_adapter_tokens=900", "max_new_tokens_limit=1000")
    with LiveServer.fake(adapters_root, *settings, step_seconds=0.01) as live:
        for name in ("dates", "other"):
            live.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id=name, source_path=name))
        live.adapters.SetAlias(admin_pb.SetAliasRequest(alias="calendar", adapter_id="dates"))
        yield live


def _long(num_tokens: int) -> dict[str, int]:
    return {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}


def test_a_flood_on_one_adapter_is_refused_and_the_others_are_served(bounded: LiveServer) -> None:
    def one_of_many(index: int) -> str:
        try:
            bounded.generate("abc", "calendar" if index % 2 else "dates", stopping=_long(60))
        except grpc.RpcError as error:
            assert "adapter 'dates' has 4 requests in the server" in str(error.details())
            return str(error.code())
        return "served"

    with ThreadPoolExecutor(32) as pool:
        flood = [pool.submit(one_of_many, index) for index in range(32)]
        assert eventually(lambda: bounded.metric("graft_requests_running") >= 4)
        began = time.monotonic()
        assert bounded.generate("abc", "other").text == "abcabc"
        assert bounded.generate("abc").text == "abc"
        assert time.monotonic() - began < 2.0
        outcomes = Counter(call.result() for call in flood)
    assert outcomes["served"] >= 4
    assert outcomes["served"] + outcomes["StatusCode.RESOURCE_EXHAUSTED"] == 32
    rejected = 'graft_admission_rejections_total{model_name="model",reason="ADAPTER_REQUESTS_FULL"}'
    assert bounded.metric(rejected) == outcomes["StatusCode.RESOURCE_EXHAUSTED"]
    # Only what was admitted counts, and what came by the alias counts under the adapter.
    assert bounded.metric('graft_adapter_requests_total{adapter="dates"') == outcomes["served"]
    assert bounded.metric('graft_adapter_requests_total{adapter="other",') == 1


def test_a_batch_gets_all_its_places_or_none(bounded: LiveServer) -> None:
    def batch(num_prompts: int) -> pb.BatchedGenerationResponse:
        prompts = [pb.GenerationRequest(text="abc")] * num_prompts
        request = pb.BatchedGenerationRequest(adapter_id="other", requests=prompts)
        return bounded.generation.Generate(request, timeout=20)

    before = bounded.metric('graft_adapter_requests_total{adapter="other",')
    running = bounded.stream("abc", "other", stopping=_long(200))
    next(running)
    assert refused(lambda: batch(4))[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_REQUESTS_FULL")
    assert len(batch(3).responses) == 3
    running.cancel()
    assert eventually(lambda: bounded.metric("graft_requests_running") == 0)
    assert len(batch(4).responses) == 4
    assert bounded.metric('graft_adapter_requests_total{adapter="other",') == before + 8


def test_more_requests_of_the_base_than_an_adapter_may_have_are_all_served(bounded: LiveServer) -> None:
    prompts = [pb.GenerationRequest(text="abc")] * 9
    answer = bounded.generation.Generate(pb.BatchedGenerationRequest(requests=prompts), timeout=20)
    assert [response.text for response in answer.responses] == ["abc"] * 9


def test_tokens_are_bounded_too(bounded: LiveServer) -> None:
    running = [bounded.stream("abc", "other", stopping=_long(240)) for _ in range(3)]
    for call in running:
        next(call)
    full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_TOKENS_FULL")
    assert refused(lambda: bounded.generate("abc", "other", stopping={"max_new_tokens": 240}))[:2] == full
    assert bounded.generate("abc", "other", stopping={"max_new_tokens": 20}).text == "abcabc"
    assert bounded.generate("abc", stopping={"max_new_tokens": 240}).text == "abc"
    assert bounded.generate("abc", "dates", stopping={"max_new_tokens": 240}).text == "abcabc"
    for call in running:
        call.cancel()
    assert eventually(lambda: bounded.metric("graft_requests_running") == 0)


def _retrying(live: LiveServer) -> grpc.Channel:
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED", "UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": [{"service": "fmaas.GenerationService"}], "retryPolicy": policy}]}
    options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(live.address, options=options)


FAILURES = 'graft_request_failures_total{code="RESOURCE_EXHAUSTED"'


def test_grpcs_own_retries_wait_as_long_as_they_are_told_and_then_succeed(bounded: LiveServer) -> None:
    """Without the server's word they would come back every 10 ms and give up after five attempts."""
    before = bounded.metric(FAILURES)
    running = [bounded.stream("abc", "other", stopping=_long(120)) for _ in range(4)]
    for call in running:
        next(call)
    began = time.monotonic()
    with _retrying(bounded) as channel:
        stub = type(bounded.generation)(channel)
        request = pb.BatchedGenerationRequest(adapter_id="other", requests=[pb.GenerationRequest(text="abc")])
        assert stub.Generate(request, timeout=30).responses[0].text == "abcabc"
    num_retries = bounded.metric(FAILURES) - before
    assert 1 <= num_retries <= 4
    assert time.monotonic() - began >= num_retries * 1.0
    for call in running:
        list(call)


def test_grpcs_own_retries_give_up_at_once_where_waiting_does_not_help(bounded: LiveServer) -> None:
    before = bounded.metric(FAILURES)
    with _retrying(bounded) as channel:
        stub = type(bounded.generation)(channel)
        prompts = [pb.GenerationRequest(text="abc")] * 5
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.BatchedGenerationRequest(adapter_id="other", requests=prompts), timeout=30)
    assert bounded.metric(FAILURES) == before + 1
    assert ("grpc-retry-pushback-ms", "-1") in [tuple(item) for item in caught.value.trailing_metadata()]
    retry = error_details_pb2.RetryInfo()
    assert not any(detail.Unpack(retry) for detail in rpc_status.from_call(caught.value).details)
