"""Percentiles and rates of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A percentile is told only where at least one observation in expectation lies beyond it.
MINIMUM_COUNTS = {50: 2, 90: 10, 99: 100}


@dataclass(frozen=True)
class Summary:
    """Of one quantity; None where there are too few observations."""

    count: int
    mean: float | None = None
    min: float | None = None
    max: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default; `ordered` ascends and is not empty."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(values: Iterable[float]) -> Summary:
    """Count, mean, extremes and the percentiles that the count allows."""
    ordered = sorted(values)
    if not ordered:
        return Summary(0)
    percentiles = {
        f"p{percent}": round(percentile(ordered, percent), 6)
        for percent, minimum in MINIMUM_COUNTS.items()
        if len(ordered) >= minimum
    }
    mean = sum(ordered) / len(ordered)
    return Summary(len(ordered), round(mean, 6), round(ordered[0], 6), round(ordered[-1], 6), **percentiles)


def rates(events: Iterable[tuple[float, float]], bin_seconds: float, num_bins: int) -> list[float]:
    """Sum of the amounts of (seconds from the start, amount) in each bin, for each second."""
    sums = [0.0] * num_bins
    for seconds, amount in events:
        sums[min(num_bins - 1, max(0, int(seconds / bin_seconds)))] += amount
    return [round(total / bin_seconds, 3) for total in sums]
