"""Percentiles against numpy, and what is told of few observations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bench.statistics import Summary, percentile, rates, summarise

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=300)


@given(values=VALUES, percent=st.floats(0, 100) | st.sampled_from([50, 90, 99]))
def test_a_percentile_equals_that_of_numpy(values: list[float], percent: float) -> None:
    seen = percentile(sorted(values), percent)
    assert seen == pytest.approx(np.percentile(values, percent, method="linear"), rel=1e-9, abs=1e-9)


@given(values=VALUES)
def test_a_summary_equals_what_numpy_says(values: list[float]) -> None:
    summary = summarise(values)
    assert summary.count == len(values)
    seen = [summary.mean, summary.min, summary.max]
    assert seen == pytest.approx([np.mean(values), np.min(values), np.max(values)], rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, ()),
        (1, ()),
        (2, ("p50",)),
        (9, ("p50",)),
        (10, ("p50", "p90")),
        (99, ("p50", "p90")),
        (100, ("p50", "p90", "p99")),
    ],
)
def test_a_percentile_is_told_from_its_least_number_of_observations_on(count: int, told: tuple[str, ...]) -> None:
    summary = summarise([1.0] * count)
    assert tuple(name for name in ("p50", "p90", "p99") if getattr(summary, name) is not None) == told


def test_of_nothing_there_is_only_the_count() -> None:
    assert summarise([]) == Summary(0)


def test_rates_are_sums_of_bins_for_each_second() -> None:
    events = [(0.0, 1.0), (0.4, 2.0), (0.5, 4.0), (1.6, 8.0)]
    assert rates(events, 0.5, 3) == [6.0, 8.0, 16.0]
