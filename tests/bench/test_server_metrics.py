"""The change between two scrapes: means exactly, percentiles as bounds."""

from __future__ import annotations

from runtime.bench.server_metrics import Buckets, changes, parse_snapshot
from runtime.engine.messages import EngineStats
from runtime.server.metrics import Metrics


def test_only_what_happened_between_two_scrapes_is_told() -> None:
    stats = [EngineStats(preemptions=3)]
    metrics = Metrics("m", lambda: stats[0])
    metrics.start_request(1000).token(500.0)
    before = parse_snapshot(metrics.scrape().decode())
    for index in range(100):
        timer = metrics.start_request(10)
        timer.token(0.25 if index < 95 else 4.0)
        timer.success("MAX_TOKENS")
    metrics.start_request(10).token(10_000.0)
    stats[0] = EngineStats(preemptions=5)
    seen = changes(before, parse_snapshot(metrics.scrape().decode()))
    assert seen["queue_seconds"] == Buckets(101, round((95 * 0.25 + 5 * 4.0 + 10_000) / 101, 6), 0.3, 0.3, 5.0)
    assert (seen["preemptions"], seen["prompt_tokens"], seen["output_tokens"]) == (2, 101 * 10, 101)
    assert seen["step_tokens"] == Buckets(0)


def test_above_the_last_bound_nothing_is_claimed() -> None:
    metrics = Metrics("m", EngineStats)
    before = parse_snapshot(metrics.scrape().decode())
    for _ in range(10):
        metrics.start_request(1).token(10_000.0)
    assert changes(before, parse_snapshot(metrics.scrape().decode()))["queue_seconds"] == Buckets(10, 10_000.0)
