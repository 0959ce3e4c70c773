"""One request on the clock: from its arrival over its first token to its end, counted in the series of all requests."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import Metric

from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server.metric_adapters import AdapterSeries
from runtime.server.metric_buckets import ITL_BUCKETS, LATENCY_BUCKETS, TTFT_BUCKETS, token_buckets
from runtime.server.metric_series import LabelledCounter, PlainCounter, PlainHistogram

DEFAULT_MAX_MODEL_LEN = 163_840  # of DeepSeek-V3, until the engine tells its own


class RequestSeries:
    """What the requests of a server add up to. Times are in seconds."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        reasons = [name for name, value in pb.StopReason.items() if value != pb.NOT_FINISHED]
        self.successes = LabelledCounter(
            "request_success", "Requests that ended normally", model_name, ["finished_reason"], len(reasons)
        )
        for reason in reasons:
            self.successes.expose(reason)
        self.prompt_tokens = PlainCounter("prompt_tokens", "Prompt tokens of requests that ran", model_name)
        self.generated = PlainCounter("generation_tokens", "Tokens generated", model_name)
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS)
        self.itl = self._histogram("inter_token_latency_seconds", "Token to next token", ITL_BUCKETS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to a normal end", LATENCY_BUCKETS)
        self.queue = self._histogram("request_queue_time_seconds", "Wait for the first step", LATENCY_BUCKETS)
        self.prefill = self._histogram("request_prefill_time_seconds", "First step to first token", LATENCY_BUCKETS)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last token", LATENCY_BUCKETS)
        self.set_max_model_len(DEFAULT_MAX_MODEL_LEN)

    def set_max_model_len(self, max_model_len: int) -> None:
        """The bounds of the two histograms of tokens depend on it; call it before the first request."""
        bounds = token_buckets(max_model_len)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of one request", bounds)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for one request", bounds
        )

    def families(self) -> Iterator[Metric]:
        """For a collector."""
        counters = (self.successes, self.prompt_tokens, self.generated)
        times = (self.ttft, self.itl, self.e2e, self.queue, self.prefill, self.decode)
        tokens = (self.request_prompt_tokens, self.request_generation_tokens)
        return (series.family() for series in (*counters, *times, *tokens))

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> PlainHistogram:
        return PlainHistogram(name, text, self._model_name, bounds)


class RequestTimer:
    """Times one request. `close` it however it ends; closing twice does nothing."""

    def __init__(
        self,
        series: RequestSeries,
        adapters: AdapterSeries,
        num_prompt_tokens: int,
        adapter: str | None,
        arrived: float,
    ) -> None:
        self._series = series
        self._adapters = adapters
        self._num_prompt_tokens = num_prompt_tokens
        self._adapter = adapter
        self._arrived = arrived
        self._first: float | None = None
        self._last = arrived
        self._num_tokens = 0
        self._is_open = True
        adapters.start(adapter)

    def token(self, queue_seconds: float | None) -> None:
        """A token has come; the first one tells how long the request waited in the engine."""
        now = time.monotonic()
        if self._first is None:
            self._begin(now, queue_seconds)
        else:
            self._series.itl.observe(now - self._last)
        self._last = now
        self._num_tokens += 1
        self._series.generated.value += 1

    def success(self, finished_reason: str) -> None:
        """The request ended normally."""
        series = self._series
        series.successes.inc(finished_reason)
        series.e2e.observe(time.monotonic() - self._arrived)
        if self._first is not None:
            series.decode.observe(self._last - self._first)
        series.request_prompt_tokens.observe(self._num_prompt_tokens)
        series.request_generation_tokens.observe(self._num_tokens)
        self.close()

    def close(self) -> None:
        """The request is over, in whatever way."""
        if self._is_open:
            self._is_open = False
            self._adapters.end(self._adapter, has_run=self._first is not None)

    def _begin(self, now: float, queue_seconds: float | None) -> None:
        series = self._series
        self._first = now
        series.ttft.observe(now - self._arrived)
        series.prompt_tokens.value += self._num_prompt_tokens
        if queue_seconds is not None:
            series.queue.observe(queue_seconds)
            series.prefill.observe(max(0.0, now - self._arrived - queue_seconds))
        if self._is_open:
            self._adapters.first_token(self._adapter)
