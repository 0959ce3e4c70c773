"""What Prometheus reads: names without units hidden, vLLM's buckets, no label that a client can grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.engine.messages import EngineStats

TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that nothing reads


class EngineCollector(Collector):
    """The engine's latest stats, read when they are scraped."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One family for each number."""
        stats = self._stats()
        kv_ratio = stats.kv_tokens_used / max(1, stats.kv_tokens_total)
        yield self._gauge("requests_running", "Sequences in the batch", stats.running)
        yield self._gauge("requests_waiting", "Sequences waiting for a place", stats.waiting)
        yield self._gauge("kv_cache_usage_ratio", "Used share of the KV cache", kv_ratio)
        yield self._gauge("adapters_resident", "Adapters in device memory", stats.adapters_resident)
        preemptions = CounterMetricFamily(
            "graft_preemptions", "Sequences put back because KV blocks ran out", labels=["model_name"]
        )
        preemptions.add_metric([self._model_name], stats.preemptions)
        yield preemptions
        tiers = GaugeMetricFamily("graft_adapter_bytes", "Bytes of loaded adapters", labels=["model_name", "tier"])
        tiers.add_metric([self._model_name, "device"], stats.adapter_device_bytes)
        tiers.add_metric([self._model_name, "host"], stats.adapter_host_bytes)
        yield tiers

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"graft_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


class Metrics:
    """All metrics of one server; gauges read the engine's latest stats when they are scraped."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.registry.register(EngineCollector(model_name, stats))
        self._draining = Gauge("graft_draining", "1 while the server drains", ["model_name"], registry=self.registry)
        self.set_draining(False)
        self._successes = self._counter("request_success", "Requests that ended normally", ["finished_reason"])
        self._failures = self._counter("request_failures", "Calls that ended with an error", ["code", "reason"])
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of started requests").labels(model_name)
        self._generated = self._counter("generation_tokens", "Tokens generated").labels(model_name)
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "Token to next token", ITL_BUCKETS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end", LATENCY_BUCKETS)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first step", LATENCY_BUCKETS)

    def scrape(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def count_failure(self, code: str, reason: str) -> None:
        """A call ended with an error status."""
        self._failures.labels(self._model_name, code, reason).inc()

    def start_request(self, num_prompt_tokens: int) -> RequestTimer:
        """A request goes to the engine now."""
        self._prompt_tokens.inc(num_prompt_tokens)
        return RequestTimer(
            self._ttft,
            self._itl,
            self._e2e,
            self._queue,
            self._generated,
            lambda reason: self._successes.labels(self._model_name, reason).inc(),
        )

    def set_draining(self, draining: bool) -> None:
        """Whether the server drains."""
        self._draining.labels(self._model_name).set(int(draining))

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"graft_{name}", text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"graft_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self._model_name)


class RequestTimer:
    """Times one request from its arrival."""

    def __init__(
        self,
        ttft: Histogram,
        itl: Histogram,
        e2e: Histogram,
        queue: Histogram,
        generated: Counter,
        count_success: Callable[[str], None],
    ) -> None:
        self._ttft, self._itl, self._e2e, self._queue = ttft, itl, e2e, queue
        self._generated = generated
        self._count_success = count_success
        self._start = time.monotonic()
        self._last: float | None = None

    def token(self, queue_seconds: float | None) -> None:
        """A token has come; the first one may tell how long the request waited in the engine."""
        now = time.monotonic()
        if self._last is None:
            self._ttft.observe(now - self._start)
        else:
            self._itl.observe(now - self._last)
        if queue_seconds is not None:
            self._queue.observe(queue_seconds)
        self._last = now
        self._generated.inc()

    def success(self, finished_reason: str) -> None:
        """The request ended normally."""
        self._e2e.observe(time.monotonic() - self._start)
        self._count_success(finished_reason)
