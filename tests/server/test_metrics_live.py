"""The metrics of a running server: counters only grow, gauges come back to zero, refusals count where they belong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from tests.server.live import LiveServer, refused

LONG = {"max_new_tokens": 200, "min_new_tokens": 200}


@pytest.fixture(scope="module")
def busy(adapters_root: Path) -> Iterator[LiveServer]:
    """Takes four requests at a time, each step 10 ms; two adapters are loaded, of which one has counts of its own."""
    settings = ("max_waiting_requests=4", "metrics_max_adapters=1", "max_adapters=8")
    with LiveServer.fake(adapters_root, *settings, step_seconds=0.01) as live:
        for name in ("dates", "other"):
            live.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id=f"{name}-1", source_path=name))
        yield live


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return holds


def samples(server: LiveServer) -> dict[tuple[str, frozenset], float]:
    """Every sample by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(server.get("/metrics")[1])
        for sample in family.samples
    }


def label(server: LiveServer, name: str) -> str:
    (labels,) = (dict(labels) for sample, labels in samples(server) if sample == "graft_lora_requests_info")
    return labels[name]


def test_counters_only_grow_and_gauges_come_back_to_zero(busy: LiveServer) -> None:
    """Under a mix of requests that end well, are cancelled and are refused."""
    scrapes = [samples(busy)]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(busy.generate, "one two three", name) for name in ("dates-1", "other-1", None)]
        cancelled = busy.stream("abc", "dates-1", stopping=LONG)
        next(cancelled)
        scrapes.append(samples(busy))
        cancelled.cancel()
        with pytest.raises(grpc.RpcError):
            busy.generate("abc", "nobody")
        while not all(call.done() for call in calls):
            scrapes.append(samples(busy))
        num_generated = sum(call.result().generated_token_count for call in calls)
    assert eventually(lambda: busy.metric("graft_requests_running") == 0)
    scrapes.append(samples(busy))
    for before, after in pairwise(scrapes):
        for (name, labels), value in before.items():
            if name.endswith(("_total", "_count", "_sum", "_bucket")):
                assert after[name, labels] >= value, name
    last = scrapes[-1]
    gauges = {name: value for (name, _), value in last.items() if name.endswith(("running", "waiting", "usage_ratio"))}
    assert gauges == {"graft_requests_running": 0, "graft_requests_waiting": 0, "graft_kv_cache_usage_ratio": 0}
    assert busy.metric("graft_generation_tokens_total") >= num_generated
    assert busy.metric("graft_iteration_tokens_total_sum") >= num_generated
    for family in text_string_to_metric_families(busy.get("/metrics")[1]):
        if family.type == "histogram":
            counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
            assert counts == sorted(counts), "buckets are cumulative"
            assert counts[-1] == next(sample.value for sample in family.samples if sample.name.endswith("_count"))


def test_the_lora_info_follows_the_calls_of_each_adapter(busy: LiveServer) -> None:
    assert (label(busy, "running_lora_adapters"), label(busy, "max_lora")) == ("", "8")
    call = busy.stream("abc", "dates-1", stopping=LONG)
    next(call)
    assert label(busy, "running_lora_adapters") == "dates-1"
    stranger = busy.stream("abc", "stranger", stopping=LONG)
    assert refused(lambda: list(stranger))[1] == "ADAPTER_NOT_FOUND"
    assert "stranger" not in busy.get("/metrics")[1]
    call.cancel()
    assert eventually(lambda: label(busy, "running_lora_adapters") == "")
    assert label(busy, "waiting_lora_adapters") == ""


def test_adapters_beyond_the_first_count_as_other(busy: LiveServer) -> None:
    names = {"dates-1": "dates-1", "other-1": "other", None: ""}
    for name, shown in names.items():
        series = f'graft_adapter_requests_total{{adapter="{shown}"'
        before = busy.metric(series)
        busy.generate("abc", name)
        assert busy.metric(series) == before + 1


def test_a_full_queue_is_a_rejection_and_a_bad_request_is_not(busy: LiveServer) -> None:
    before = busy.metric("graft_admission_rejections_total")
    assert refused(lambda: busy.generate("abc", stopping={"max_new_tokens": 10**6}))[1] == "INVALID_PARAMETER"
    assert busy.metric("graft_admission_rejections_total") == before
    calls = [busy.stream("abc", stopping=LONG) for _ in range(4)]
    for call in calls:
        next(call)
    failures = 'graft_request_failures_total{code="RESOURCE_EXHAUSTED"'
    num_failures = busy.metric(failures)
    assert refused(lambda: busy.generate("abc"))[1] == "QUEUE_FULL"
    assert busy.metric('graft_admission_rejections_total{model_name="model",reason="QUEUE_FULL"}') == 1
    assert busy.metric(failures) == num_failures + 1
    for call in calls:
        call.cancel()
    assert eventually(lambda: busy.metric("graft_requests_running") == 0)


def test_calls_of_operators_are_no_failed_requests(busy: LiveServer) -> None:
    before = busy.metric("graft_request_failures_total")
    unknown = admin_pb.GetAdapterRequest(name="adapters/nobody")
    assert refused(lambda: busy.adapters.GetAdapter(unknown))[0] is grpc.StatusCode.NOT_FOUND
    assert busy.metric("graft_request_failures_total") == before


def test_a_request_while_the_server_drains_is_a_rejection(adapters_root: Path) -> None:
    with LiveServer.fake(adapters_root, step_seconds=0.01) as live:
        call = live.stream("abc", stopping=LONG)
        next(call)
        live.process.terminate()
        assert eventually(lambda: live.metric("graft_draining") == 1)
        assert refused(lambda: live.generate("abc"))[1] == "DRAINING"
        load = admin_pb.LoadAdapterRequest(adapter_id="a", source_path="dates")
        assert refused(lambda: live.adapters.LoadAdapter(load))[1] == "DRAINING"
        assert live.metric('graft_admission_rejections_total{model_name="model",reason="DRAINING"}') == 1
        call.cancel()
        assert live.process.wait(10) == 0
