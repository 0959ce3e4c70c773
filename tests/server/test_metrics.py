"""The metrics of a server: their names and types, what each event changes, and that no client can grow them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from runtime.adapters.info import AdapterInfo
from runtime.engine.messages import EngineStats
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server import request_timer
from runtime.server.metrics import ADMISSION_REASONS, MAX_FAILURE_SERIES, Metrics

FAMILIES = {
    "graft_adapter_bytes": "gauge",
    "graft_adapter_vacant_bytes": "gauge",
    "graft_adapter_fragmentation_ratio": "gauge",
    "graft_adapter_hits": "counter",
    "graft_adapter_loads": "counter",
    "graft_adapter_evictions": "counter",
    "graft_requests_waiting_for_adapter": "gauge",
    "graft_manifest_entries": "counter",
    "graft_adapter_requests": "counter",
    "graft_adapters_resident": "gauge",
    "graft_admission_rejections": "counter",
    "graft_draining": "gauge",
    "graft_e2e_request_latency_seconds": "histogram",
    "graft_generation_tokens": "counter",
    "graft_inter_token_latency_seconds": "histogram",
    "graft_iteration_tokens_total": "histogram",
    "graft_kv_cache_usage_ratio": "gauge",
    "graft_lora_requests_info": "gauge",
    "graft_preemptions": "counter",
    "graft_prompt_tokens": "counter",
    "graft_request_decode_time_seconds": "histogram",
    "graft_request_failures": "counter",
    "graft_request_generation_tokens": "histogram",
    "graft_request_prefill_time_seconds": "histogram",
    "graft_request_prompt_tokens": "histogram",
    "graft_request_queue_time_seconds": "histogram",
    "graft_request_success": "counter",
    "graft_requests_running": "gauge",
    "graft_requests_waiting": "gauge",
    "graft_requests_paused": "gauge",
    "graft_time_to_first_token_seconds": "histogram",
}
# vllm/v1/metrics/buckets.py
TTFT = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
ITL = ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
LATENCY = ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
TOKENS = "1 2 5 10 20 50 100 200 500 1000 2000"
BUCKETS = {
    "graft_time_to_first_token_seconds": TTFT,
    "graft_inter_token_latency_seconds": ITL,
    "graft_e2e_request_latency_seconds": LATENCY,
    "graft_request_queue_time_seconds": LATENCY,
    "graft_request_prefill_time_seconds": LATENCY,
    "graft_request_decode_time_seconds": LATENCY,
    "graft_request_prompt_tokens": TOKENS,
    "graft_request_generation_tokens": TOKENS,
    "graft_iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
}


class Clock:
    """A monotonic clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(request_timer, "time", clock)
    return clock


def adapter(name: str, state: str = "READY") -> AdapterInfo:
    return AdapterInfo(name, 1, "sha256:0", state)


def families(metrics: Metrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.scrape().decode())}


def values(metrics: Metrics, sample: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Value by the named labels of every sample of this name that is not zero."""
    found = [s for family in families(metrics).values() for s in family.samples if s.name == sample]
    return {tuple(s.labels[label] for label in labels): s.value for s in found if s.value}


def value(metrics: Metrics, sample: str) -> float:
    return values(metrics, sample).get((), 0.0)


def test_names_and_types_are_these() -> None:
    metrics = Metrics("m", EngineStats)
    metrics.count_failure("INTERNAL", "INTERNAL")
    parsed = families(metrics)
    assert {name: family.type for name, family in parsed.items()} == FAMILIES
    for family in parsed.values():
        assert family.documentation and family.samples
        for sample in family.samples:
            assert re.fullmatch("graft_[a-z0-9_]+", sample.name), "a colon is for recording rules"
            assert sample.labels["model_name"] == "m"
            if family.type == "counter":
                assert sample.name.endswith("_total")


def test_the_page_of_metrics_names_these_and_no_others() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(graft_[a-z0-9_]+)` \| (\w+)", page, re.MULTILINE))
    totals = {f"{name}_total" if kind == "counter" else name: kind for name, kind in FAMILIES.items()}
    assert rows == totals


def test_bounds_are_those_of_vllm() -> None:
    metrics = Metrics("m", EngineStats)
    metrics.set_max_model_len(4096)
    seen = {}
    for name, family in families(metrics).items():
        if family.type == "histogram":
            bounds = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
            assert bounds.pop() == "+Inf"
            seen[name] = [float(bound) for bound in bounds]
    assert seen == {name: [float(bound) for bound in bounds.split()] for name, bounds in BUCKETS.items()}


def test_one_request_is_timed_from_its_arrival_to_its_end(clock: Clock) -> None:
    metrics = Metrics("m", EngineStats)
    timer = metrics.start_request(7, None, arrived=999.0)
    clock.now = 1001.0
    timer.token(0.5)
    for gap in (0.25, 0.75):
        clock.now += gap
        timer.token(None)
    clock.now = 1010.0
    timer.success("EOS_TOKEN")
    sums = {
        "time_to_first_token_seconds": 2.0,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.5,
        "inter_token_latency_seconds": 1.0,
        "request_decode_time_seconds": 1.0,
        "e2e_request_latency_seconds": 11.0,
        "request_prompt_tokens": 7,
        "request_generation_tokens": 3,
    }
    assert {name: value(metrics, f"graft_{name}_sum") for name in sums} == sums
    assert value(metrics, "graft_inter_token_latency_seconds_count") == 2
    assert {value(metrics, f"graft_{name}_count") for name in sums if name != "inter_token_latency_seconds"} == {1}
    assert (value(metrics, "graft_prompt_tokens_total"), value(metrics, "graft_generation_tokens_total")) == (7, 3)
    assert values(metrics, "graft_request_success_total", "finished_reason") == {("EOS_TOKEN",): 1}


def test_a_request_that_never_ran_counts_neither_prompt_tokens_nor_latencies() -> None:
    metrics = Metrics("m", EngineStats)
    metrics.start_request(7).close()
    assert value(metrics, "graft_prompt_tokens_total") == 0
    assert not [name for name in BUCKETS if value(metrics, f"{name}_count")]


def test_the_series_of_reasons_begin_at_zero() -> None:
    """A rate over a series that appears with its first event misses that event."""
    parsed = families(Metrics("m", EngineStats))
    reasons = {sample.labels["finished_reason"] for sample in parsed["graft_request_success"].samples}
    assert reasons == set(pb.StopReason.keys()) - {"NOT_FINISHED"}
    rejections = parsed["graft_admission_rejections"].samples
    assert {sample.labels["reason"] for sample in rejections} == set(ADMISSION_REASONS)


def lora(metrics: Metrics) -> tuple[str, str, str]:
    names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    (labels,) = values(metrics, "graft_lora_requests_info", *names)
    return labels


def test_the_lora_info_names_adapters_that_wait_and_run_and_its_value_is_the_time() -> None:
    metrics = Metrics("m", EngineStats, max_lora=8)
    metrics.update_adapters([adapter("b"), adapter("a"), adapter("c", "LOADING")])
    assert lora(metrics) == ("8", "", "")
    first, second, base = (metrics.start_request(1, name) for name in ("b", "a", None))
    stranger, loading = metrics.start_request(1, "stranger"), metrics.start_request(1, "c")
    assert lora(metrics) == ("8", "", "a,b")
    for timer in (first, base, stranger, loading):
        timer.token(0.0)
    assert lora(metrics) == ("8", "b", "a")
    third = metrics.start_request(1, "b")
    assert lora(metrics) == ("8", "b", "a,b")
    metrics.update_adapters([adapter("b", "DRAINING")])
    assert lora(metrics) == ("8", "", "a")
    for timer in (first, second, third, base, stranger, loading):
        timer.close()
        timer.close()
    assert lora(metrics) == ("8", "", "")
    assert value(metrics, "graft_lora_requests_info") == pytest.approx(time.time(), abs=60)


def test_the_first_adapters_that_are_loaded_have_counts_of_their_own_and_keep_them() -> None:
    metrics = Metrics("m", EngineStats, max_adapter_labels=2)
    metrics.update_adapters([adapter("a")])
    metrics.update_adapters([adapter("b"), adapter("c")])
    metrics.update_adapters([adapter("a", "UNLOADED"), adapter("d")])
    for name in ("a", "b", "b", "c", "d", "stranger", None):
        metrics.start_request(1, name).close()
    counts = {("a",): 1, ("b",): 2, ("other",): 3, ("",): 1}
    assert values(metrics, "graft_adapter_requests_total", "adapter") == counts


def test_steps_are_counted_by_their_tokens_and_stats_without_a_step_are_not() -> None:
    metrics = Metrics("m", EngineStats)
    for num_tokens in (1, 9, 0, 512):
        metrics.count_step(EngineStats(iteration_tokens=num_tokens))
    assert value(metrics, "graft_iteration_tokens_total_count") == 3
    assert value(metrics, "graft_iteration_tokens_total_sum") == 522
    buckets = values(metrics, "graft_iteration_tokens_total_bucket", "le")
    assert [buckets[(bound,)] for bound in ("1.0", "8.0", "16.0", "256.0", "512.0", "+Inf")] == [1, 1, 2, 2, 3, 3]


def test_only_the_servers_state_counts_as_a_rejection() -> None:
    metrics = Metrics("m", EngineStats)
    for reason in (*ADMISSION_REASONS, "QUEUE_FULL", "INVALID_PARAMETER", "ADAPTER_NOT_FOUND", "SERVER_STOPPED"):
        metrics.count_rejection(reason)
    expected = {(reason,): 1 for reason in ADMISSION_REASONS} | {("QUEUE_FULL",): 2}
    assert values(metrics, "graft_admission_rejections_total", "reason") == expected


WORDS = st.text(max_size=80)


@given(
    max_labels=st.integers(0, 5),
    loaded=st.lists(WORDS, max_size=20),
    asked=st.lists(WORDS, max_size=40),
    failures=st.lists(st.tuples(WORDS, WORDS), max_size=3 * MAX_FAILURE_SERIES),
    reasons=st.lists(WORDS, max_size=40),
)
def test_no_client_can_grow_the_number_of_series(
    max_labels: int, loaded: list[str], asked: list[str], failures: list[tuple[str, str]], reasons: list[str]
) -> None:
    """The bound: those of a new server, a series for each of the first adapters, and the failures' own bound."""
    new = Metrics("m", EngineStats, max_adapter_labels=max_labels)
    num_new = sum(len(family.samples) for family in families(new).values())
    metrics = Metrics("m", EngineStats, max_adapter_labels=max_labels)
    metrics.update_adapters([adapter(name) for name in loaded])
    for name in asked:
        timer = metrics.start_request(1, name)
        timer.token(0.0)
        timer.success(name)
    for code, reason in failures:
        metrics.count_failure(code, reason)
    for reason in reasons:
        metrics.count_rejection(reason)
    parsed = families(metrics)
    bound = num_new + max_labels + (MAX_FAILURE_SERIES + 1) + 1  # + 1: finished_reason "other"
    assert sum(len(family.samples) for family in parsed.values()) <= bound
    assert len(parsed["graft_adapter_requests"].samples) <= max_labels + 2
    assert len(parsed["graft_lora_requests_info"].samples) == 1
    assert sum(sample.value for sample in parsed["graft_request_failures"].samples) == len(failures)
    assert value(metrics, "graft_generation_tokens_total") == len(asked)
