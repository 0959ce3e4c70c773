"""Our plain counters and histograms give, to the byte, the text of prometheus_client's own for the same events."""

from __future__ import annotations

import timeit
from collections.abc import Iterator

import prometheus_client
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, disable_created_metrics, enable_created_metrics, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from runtime.engine.messages import EngineStats
from runtime.server.metric_buckets import ITL_BUCKETS, LATENCY_BUCKETS, TTFT_BUCKETS, token_buckets
from runtime.server.metric_series import LabelledCounter, PlainCounter, PlainHistogram
from runtime.server.metrics import Metrics
from tests.conftest import RecordNumber


@pytest.fixture(scope="module", autouse=True)
def no_created_series() -> Iterator[None]:
    """The `_created` series of prometheus_client's classes have no counterpart here, on purpose."""
    disable_created_metrics()
    yield
    enable_created_metrics()


class Of(Collector):
    """A collector of one of our series."""

    def __init__(self, series: PlainCounter | LabelledCounter | PlainHistogram) -> None:
        self.series = series

    def collect(self) -> Iterator[Metric]:
        yield self.series.family()


def text_of(collector: Collector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


BOUNDS = (TTFT_BUCKETS, ITL_BUCKETS, LATENCY_BUCKETS, token_buckets(4096))


@given(
    bounds=st.sampled_from(BOUNDS),
    values=st.lists(st.floats(0, 1e5) | st.integers(0, 10_000) | st.sampled_from([b for s in BOUNDS for b in s])),
)
@example(bounds=ITL_BUCKETS, values=[0.0, 0.01, 80.0, 80.00000001, 1e9])
def test_a_histogram_equals_that_of_prometheus_client(bounds: tuple[float, ...], values: list[float]) -> None:
    ours = PlainHistogram("h_seconds", 'Some "text"\nof help', "mödel\\", bounds)
    theirs = prometheus_client.Histogram(
        "graft_h_seconds", 'Some "text"\nof help', ["model_name"], registry=None, buckets=bounds
    )
    child = theirs.labels("mödel\\")
    for value in values:
        ours.observe(value)
        child.observe(value)
    assert text_of(Of(ours)) == text_of(theirs)


EVENTS = st.tuples(st.sampled_from("abc"), st.sampled_from(['x"', "y"]))


@given(events=st.lists(EVENTS), amounts=st.lists(st.integers(0, 10**9)))
def test_counters_equal_those_of_prometheus_client(events: list[tuple[str, str]], amounts: list[int]) -> None:
    plain, labelled = PlainCounter("n", "Help", "m"), LabelledCounter("l", "Help", "m", ["code", "reason"], 100)
    their_plain = prometheus_client.Counter("graft_n", "Help", ["model_name"], registry=None)
    their_labelled = prometheus_client.Counter("graft_l", "Help", ["model_name", "code", "reason"], registry=None)
    their_plain.labels("m")
    for amount in amounts:
        plain.value += amount
        their_plain.labels("m").inc(amount)
    for event in events:
        labelled.inc(*event)
        their_labelled.labels("m", *event).inc()
    assert text_of(Of(plain)) == text_of(their_plain)
    assert text_of(Of(labelled)) == text_of(their_labelled)


@pytest.mark.parametrize(
    ("max_model_len", "bounds"),
    [
        (1, (1,)),
        (100, (1, 2, 5, 10, 20, 50, 100)),
        (256, (1, 2, 5, 10, 20, 50, 100, 200)),
        (4096, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)),
    ],
)
def test_token_bounds_go_up_in_1_2_5_steps_to_the_longest_sequence(max_model_len: int, bounds: tuple) -> None:
    assert token_buckets(max_model_len) == bounds


def test_a_streamed_token_costs_at_most_2_us_of_metrics(record_number: RecordNumber) -> None:
    timer = Metrics("model", EngineStats).start_request(10, "adapter")
    timer.token(0.0)
    number = 20_000
    seconds = min(timeit.repeat(lambda: timer.token(None), number=number, repeat=7))
    record_number("metrics, us for one streamed token", 1e6 * seconds / number, at_most=2.0)
