"""Which adapters have calls open, and how many each has had; no name that an operator did not load becomes a label."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.adapters.expression import is_sum
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.server.metric_series import MODEL_LABEL, OTHER, PREFIX

BASE = ""
LIVE = (AdapterState.READY, AdapterState.REGISTERED)
GONE = (AdapterState.DRAINING, AdapterState.UNLOADED, AdapterState.FAILED)


class AdapterSeries:
    """The first `max_labels` adapters that are loaded get a series of their own, for good; the others share `other`.

    An adapter whose name is `other` counts among them. `max_lora` is how many adapters the device takes.
    """

    def __init__(self, model_name: str, max_lora: int, max_labels: int, clock: Callable[[], float] = time.time) -> None:
        self._model_name = model_name
        self._max_lora = max_lora
        self._max_labels = max_labels
        self._clock = clock
        self._loaded: dict[str, set[int]] = {}
        self._requests = {BASE: 0, OTHER: 0}
        self._waiting: Counter[str] = Counter()
        self._running: Counter[str] = Counter()

    def update(self, adapters: Iterable[AdapterInfo]) -> None:
        """The engine has told of adapters: those with a live generation may be named in labels."""
        for adapter in adapters:
            if adapter.derived:
                continue  # clients choose the weights, so there is no end of such names
            generations = self._loaded.setdefault(adapter.name, set())
            if adapter.state in GONE:
                generations.discard(adapter.generation)
            elif adapter.state in LIVE:
                generations.add(adapter.generation)
            if not generations:
                del self._loaded[adapter.name]
                continue
            if len(self._requests) - 2 < self._max_labels:
                self._requests.setdefault(adapter.name, 0)

    def start(self, adapter: str | None) -> None:
        """A call begins to wait for its first token; None is the base."""
        name = adapter or BASE
        self._requests[name if name in self._requests else OTHER] += 1
        self._waiting[name] += 1

    def first_token(self, adapter: str | None) -> None:
        """A waiting call runs."""
        name = adapter or BASE
        _decrease(self._waiting, name)
        self._running[name] += 1

    def end(self, adapter: str | None, *, has_run: bool) -> None:
        """A call has ended, with or without having had a first token."""
        _decrease(self._running if has_run else self._waiting, adapter or BASE)

    def families(self) -> Iterator[Metric]:
        """For a collector."""
        info = GaugeMetricFamily(
            f"{PREFIX}lora_requests_info",
            "Adapters with running and with waiting requests; the value is the Unix time of this answer",
            labels=[MODEL_LABEL, "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [self._model_name, str(self._max_lora), self._names(self._running), self._names(self._waiting)]
        info.add_metric(labels, self._clock())
        yield info
        requests = CounterMetricFamily(
            f"{PREFIX}adapter_requests", "Requests that went to the engine", labels=[MODEL_LABEL, "adapter"]
        )
        for name, count in self._requests.items():
            requests.add_metric([self._model_name, name], count)
        yield requests

    def _names(self, calls: Counter[str]) -> str:
        return ",".join(sorted(self._loaded.keys() & calls.keys()))


def label_of(reference: str, adapter_named: Callable[[str], str]) -> str:
    """The name under which a request counts: the adapter's, whatever alias or generation the request gives.

    A weighted sum counts as it is, and so among the others.
    """
    return reference if is_sum(reference) else adapter_named(reference)


def _decrease(calls: Counter[str], name: str) -> None:
    """Names without calls are forgotten, so that the names of strangers take no memory."""
    calls[name] -= 1
    if calls[name] <= 0:
        del calls[name]
