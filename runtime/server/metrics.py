"""What Prometheus reads: base units, vLLM's buckets, the model on every series, no label that clients can grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.adapters.info import AdapterInfo
from runtime.engine.messages import EngineStats
from runtime.server.metric_adapters import AdapterSeries
from runtime.server.metric_buckets import ITERATION_TOKENS_BUCKETS
from runtime.server.metric_engine import engine_families
from runtime.server.metric_series import MODEL_LABEL, PREFIX, LabelledCounter, PlainHistogram
from runtime.server.request_timer import RequestSeries, RequestTimer

ADMISSION_REASONS = (
    "QUEUE_FULL",
    "ADAPTER_REQUESTS_FULL",
    "ADAPTER_TOKENS_FULL",
    "STARTING",
    "DRAINING",
    "DEADLINE_TOO_SHORT",
)
MAX_FAILURE_SERIES = 128
MANIFEST_OUTCOMES = ("applied", "failed")


class Metrics(Collector):
    """All metrics of one server. Not thread-safe: everything happens in the front-end's event loop."""

    def __init__(
        self, model_name: str, stats: Callable[[], EngineStats], *, max_lora: int = 0, max_adapter_labels: int = 64
    ) -> None:
        self._model_name = model_name
        self._stats = stats
        self._is_draining = False
        self._requests = RequestSeries(model_name)
        self._adapters = AdapterSeries(model_name, max_lora, max_adapter_labels)
        self._iteration_tokens = PlainHistogram(
            "iteration_tokens_total", "Tokens computed in one step", model_name, ITERATION_TOKENS_BUCKETS
        )
        self._failures = LabelledCounter(
            "request_failures", "Calls that ended with an error", model_name, ["code", "reason"], MAX_FAILURE_SERIES
        )
        self._rejections = LabelledCounter(
            "admission_rejections",
            "Requests refused for the server's state",
            model_name,
            ["reason"],
            len(ADMISSION_REASONS),
        )
        for reason in ADMISSION_REASONS:
            self._rejections.expose(reason)
        self._manifest = LabelledCounter(
            "manifest_entries", "Changes that the manifest asked for", model_name, ["outcome"], len(MANIFEST_OUTCOMES)
        )
        for outcome in MANIFEST_OUTCOMES:
            self._manifest.expose(outcome)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def scrape(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every family; prometheus_client calls this."""
        yield from engine_families(self._model_name, self._stats())
        draining = GaugeMetricFamily(f"{PREFIX}draining", "1 while the server drains", labels=[MODEL_LABEL])
        draining.add_metric([self._model_name], int(self._is_draining))
        yield draining
        yield from self._requests.families()
        yield from self._adapters.families()
        for series in (self._iteration_tokens, self._failures, self._rejections, self._manifest):
            yield series.family()

    def set_max_model_len(self, max_model_len: int) -> None:
        """The engine is ready and tells its longest sequence, prompt and output tokens together."""
        self._requests.set_max_model_len(max_model_len)

    def set_draining(self, draining: bool) -> None:
        """Whether the server drains."""
        self._is_draining = draining

    def update_adapters(self, adapters: Iterable[AdapterInfo]) -> None:
        """The engine has answered with these adapters."""
        self._adapters.update(adapters)

    def count_step(self, stats: EngineStats) -> None:
        """The engine has sent stats; those of a step tell how many tokens it computed."""
        if stats.iteration_tokens:
            self._iteration_tokens.observe(stats.iteration_tokens)

    def count_failure(self, code: str, reason: str) -> None:
        """A call ended with an error status."""
        self._failures.inc(code, reason)

    def count_rejection(self, reason: str) -> None:
        """A request for text was refused; for a reason that lies in the request itself nothing is counted."""
        if reason in ADMISSION_REASONS:
            self._rejections.inc(reason)

    def count_manifest(self, *, applied: bool) -> None:
        """An entry of the manifest was brought about, or failed."""
        self._manifest.inc(MANIFEST_OUTCOMES[0 if applied else 1])

    def start_request(
        self, num_prompt_tokens: int, adapter: str | None = None, arrived: float | None = None
    ) -> RequestTimer:
        """A request goes to the engine; `arrived` is when it came here, on the monotonic clock (default: now)."""
        started = time.monotonic() if arrived is None else arrived
        return RequestTimer(self._requests, self._adapters, num_prompt_tokens, adapter, started)
