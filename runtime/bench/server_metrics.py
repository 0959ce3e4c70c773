"""The server's own view of a benchmark: how its /metrics changed, other clients' requests included."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from runtime.bench.statistics import MINIMUM_COUNTS
from runtime.errors import GraftError

TIMEOUT_SECONDS = 10.0
HISTOGRAMS = {
    "queue_seconds": "graft_request_queue_time_seconds",
    "prefill_seconds": "graft_request_prefill_time_seconds",
    "decode_seconds": "graft_request_decode_time_seconds",
    "ttft_seconds": "graft_time_to_first_token_seconds",
    "itl_seconds": "graft_inter_token_latency_seconds",
    "e2e_seconds": "graft_e2e_request_latency_seconds",
    "step_tokens": "graft_iteration_tokens_total",
}
COUNTERS = {
    "preemptions": "graft_preemptions_total",
    "prompt_tokens": "graft_prompt_tokens_total",
    "output_tokens": "graft_generation_tokens_total",
}

Snapshot = dict[tuple[str, str], float]  # (name of the sample, upper bound or "") -> sum over all other labels


@dataclass(frozen=True)
class Buckets:
    """What a histogram tells of a quantity: its mean, and of a percentile the upper bound of the bucket it lies in.

    None where there are too few observations, or where the percentile lies above the last finite bound.
    """

    count: int
    mean: float | None = None
    p50_at_most: float | None = None
    p90_at_most: float | None = None
    p99_at_most: float | None = None


def read_snapshot(address: str) -> Snapshot:
    """Every sample of a server's /metrics; raises GraftError if there is no answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_SECONDS) as response:
            return parse_snapshot(response.read().decode())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise GraftError(f"no metrics at http://{address}/metrics: {error}", reason="NO_METRICS") from error


def parse_snapshot(text: str) -> Snapshot:
    """Every sample of the text format."""
    snapshot: Snapshot = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("le", "")
            snapshot[key] = snapshot.get(key, 0.0) + sample.value
    return snapshot


def changes(before: Snapshot, after: Snapshot) -> dict[str, Buckets | float]:
    """What was counted between two snapshots."""
    delta = {key: value - before.get(key, 0.0) for key, value in after.items()}
    found: dict[str, Buckets | float] = {name: _buckets(delta, series) for name, series in HISTOGRAMS.items()}
    return found | {name: delta.get((series, ""), 0.0) for name, series in COUNTERS.items()}


def _buckets(delta: Snapshot, series: str) -> Buckets:
    count = int(delta.get((f"{series}_count", ""), 0))
    if not count:
        return Buckets(0)
    counts = sorted((float(bound), value) for (name, bound), value in delta.items() if name == f"{series}_bucket")
    bounds = {
        f"p{percent}_at_most": next((bound for bound, value in counts if value >= count * percent / 100), math.inf)
        for percent, minimum in MINIMUM_COUNTS.items()
        if count >= minimum
    }
    finite = {name: bound for name, bound in bounds.items() if bound < math.inf}
    return Buckets(count, round(delta[f"{series}_sum", ""] / count, 6), **finite)
