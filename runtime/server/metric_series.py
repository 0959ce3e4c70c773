"""Counters and histograms as plain numbers, which prometheus_client turns into text when they are scraped.

The front-end counts every streamed token, in the one thread of its event loop. prometheus_client's own classes take a
lock for each number and walk the buckets in Python; these take neither, and a test holds their text against its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

PREFIX = "graft_"
MODEL_LABEL = "model_name"
OTHER = "other"


class PlainCounter:
    """A number that only grows; the hot path adds to `value`. The text format appends `_total` to the name."""

    __slots__ = ("_model_name", "_name", "_text", "value")

    def __init__(self, name: str, text: str, model_name: str) -> None:
        self._name, self._text, self._model_name = PREFIX + name, text, model_name
        self.value = 0

    def family(self) -> CounterMetricFamily:
        """For a collector."""
        family = CounterMetricFamily(self._name, self._text, labels=[MODEL_LABEL])
        family.add_metric([self._model_name], self.value)
        return family


class LabelledCounter:
    """A counter for each combination of labels: the first `max_series` that come, and one whose labels are `other`."""

    def __init__(self, name: str, text: str, model_name: str, labels: Sequence[str], max_series: int) -> None:
        self._name, self._text, self._model_name = PREFIX + name, text, model_name
        self._labels = tuple(labels)
        self._max_series = max_series
        self._overflow = (OTHER,) * len(self._labels)
        self._values: dict[tuple[str, ...], int] = {}

    def expose(self, *labels: str) -> None:
        """Let a series begin at zero, so that a rate sees its first event. Beyond `max_series` nothing happens."""
        self._values.setdefault(self._bounded(labels), 0)

    def inc(self, *labels: str) -> None:
        """Count one event."""
        labels = self._bounded(labels)
        self._values[labels] = self._values.get(labels, 0) + 1

    def family(self) -> CounterMetricFamily:
        """For a collector."""
        family = CounterMetricFamily(self._name, self._text, labels=[MODEL_LABEL, *self._labels])
        for labels, value in self._values.items():
            family.add_metric([self._model_name, *labels], value)
        return family

    def _bounded(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        is_known = labels in self._values
        return labels if is_known or len(self._values) < self._max_series else self._overflow


class PlainHistogram:
    """Observations counted by upper bound (`bounds` ascending; what is above the last one counts as +Inf)."""

    __slots__ = ("_counts", "_model_name", "_name", "_sum", "_text", "bounds")

    def __init__(self, name: str, text: str, model_name: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._model_name = PREFIX + name, text, model_name
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def family(self) -> HistogramMetricFamily:
        """For a collector."""
        family = HistogramMetricFamily(self._name, self._text, labels=[MODEL_LABEL])
        names = [floatToGoString(bound) for bound in (*self.bounds, float("inf"))]  # type: ignore[no-untyped-call]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric([self._model_name], buckets, self._sum)
        return family
