"""The result as plain data for a JSON file; docs/bench.md describes every key, and a test holds the two together."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from runtime.bench.record import RequestError, RequestRecord
from runtime.bench.run import BenchRun
from runtime.bench.server_metrics import Buckets, changes
from runtime.bench.statistics import MINIMUM_COUNTS, rates, summarise
from runtime.pb.fmaas import generation_pb2 as pb

SCHEMA_VERSION = 1
TIMELINE_BINS = 60
LEAST_BIN_SECONDS = 0.1

Report = dict[str, Any]


def build_report(run: BenchRun, command: str) -> Report:
    """Everything about a run; adapters in the order of their names, "" being the base."""
    groups = {adapter: [r for r in run.records if r.adapter == adapter] for adapter in _adapters(run)}
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "started": run.started.isoformat(timespec="milliseconds"),
        "versions": _versions(),
        "server": {
            "address": run.plan.server,
            "model_kind": pb.ModelInfoResponse.ModelKind.Name(run.info.model_kind),
            "max_sequence_length": run.info.max_sequence_length,
            "max_new_tokens": run.info.max_new_tokens,
        },
        "plan": _plan(run),
        "percentiles": {"method": "linear", "minimum_counts": {f"p{p}": n for p, n in MINIMUM_COUNTS.items()}},
        "window_seconds": round(run.window_seconds, 6),
        "client_cpu_share": round(run.client_cpu_seconds / run.wall_seconds, 4),
        "warmup": {
            "requests": len(run.warmup_records),
            "errors": _errors([record.error for record in run.warmup_records if record.error]),
        },
        "overall": _group(run, run.records),
        "adapters": [{"adapter": adapter, **_group(run, records)} for adapter, records in groups.items()],
        "server_metrics": _server_metrics(run),
        "timeline": _timeline(run),
        "requests": [_request(run, record) for record in run.records],
    }


def _adapters(run: BenchRun) -> list[str]:
    return sorted({record.adapter for record in run.records})


def _versions() -> dict[str, str]:
    packages = {"graft": "graft-moe", "grpcio": "grpcio", "protobuf": "protobuf"}
    return {
        **{name: _version(package) for name, package in packages.items()},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


def _plan(run: BenchRun) -> dict[str, Any]:
    plan = run.plan
    return {
        "arrivals": "poisson" if plan.is_open_loop else "closed_loop",
        "timed_from": "scheduled_arrival" if plan.is_open_loop else "send",
        "rate_per_second": plan.rate or None,
        "concurrency": plan.concurrency or None,
        "requests": None if plan.seconds else plan.num_requests,
        "seconds": plan.seconds or None,
        "adapters": [{"adapter": name, "weight": weight} for name, weight in plan.adapters],
        "prompt_tokens": None if plan.prompts_path else str(plan.prompt_tokens),
        "prompts_file": None if plan.prompts_path is None else str(plan.prompts_path),
        "output_tokens": str(plan.output_tokens),
        "stop_at_eos": plan.stop_at_eos,
        "temperature": plan.temperature,
        "seed": plan.seed,
        "warmup_requests": plan.num_warmup,
        "timeout_seconds": plan.timeout_seconds,
        "connections": plan.num_connections,
    }


def _group(run: BenchRun, records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Latencies and rates are those of the requests that succeeded."""
    good = [record for record in records if record.error is None]
    ended, prompt_tokens, output_tokens = _events(run, good)
    window = run.window_seconds
    latencies = {
        "ttft_seconds": [record.ttft_seconds for record in good if record.ttft_seconds is not None],
        "itl_seconds": [gap for record in good for gap in record.gaps_seconds],
        "tpot_seconds": [record.tpot_seconds for record in good if record.tpot_seconds is not None],
        "e2e_seconds": [record.e2e_seconds for record in good],
        "queue_seconds": [record.queue_seconds for record in good],
    }
    return {
        "requests": len(good),
        "failed": len(records) - len(good),
        "requests_per_second": _rate(ended, window),
        "prompt_tokens_per_second": _rate(prompt_tokens, window),
        "output_tokens_per_second": _rate(output_tokens, window),
        "prompt_tokens": sum(record.prompt_tokens for record in good),
        "output_tokens": sum(record.output_tokens for record in good),
        **{name: asdict(summarise(values)) for name, values in latencies.items()},
        "stop_reasons": dict(sorted(Counter(record.stop_reason for record in good).items())),
        "errors": _errors([record.error for record in records if record.error]),
    }


Events = list[tuple[float, float]]  # (seconds from the start, amount)


def _events(run: BenchRun, records: Sequence[RequestRecord]) -> tuple[Events, Events, Events]:
    """When requests ended, prompts were done (at their first token), and output tokens came."""
    ended = [(record.ended - run.start, 1.0) for record in records]
    prompts = [(record.times[0] - run.start, float(record.prompt_tokens)) for record in records if record.times]
    outputs = [
        (when - run.start, float(count - before))
        for record in records
        for when, count, before in zip(record.times, record.counts, [0, *record.counts], strict=False)
    ]
    return ended, prompts, outputs


def _rate(events: Events, window_seconds: float) -> float | None:
    """Per second of the window; what happened after its end does not count."""
    if window_seconds <= 0:
        return None
    return round(sum(amount for seconds, amount in events if seconds <= window_seconds) / window_seconds, 4)


def _errors(errors: Sequence[RequestError]) -> list[dict[str, Any]]:
    """How often each code and reason came, most often first, with the sentence of the first."""
    examples: dict[tuple[str, str], str] = {}
    for error in errors:
        examples.setdefault((error.code, error.reason), error.message)
    counts = Counter((error.code, error.reason) for error in errors)
    return [
        {"code": code, "reason": reason, "count": count, "example": examples[code, reason]}
        for (code, reason), count in counts.most_common()
    ]


def _server_metrics(run: BenchRun) -> dict[str, Any] | None:
    if run.snapshots is None:
        return None
    return {
        name: asdict(value) if isinstance(value, Buckets) else value for name, value in changes(*run.snapshots).items()
    }


def _timeline(run: BenchRun) -> dict[str, Any]:
    """Rates over the whole run, the end after the window included."""
    good = [record for record in run.records if record.error is None]
    ended, _, output_tokens = _events(run, good)
    length = max((seconds for seconds, _ in ended), default=0.0)
    bin_seconds = max(LEAST_BIN_SECONDS, length / TIMELINE_BINS)
    num_bins = max(1, math.ceil(length / bin_seconds))
    return {
        "bin_seconds": round(bin_seconds, 6),
        "requests_per_second": rates(ended, bin_seconds, num_bins),
        "output_tokens_per_second": rates(output_tokens, bin_seconds, num_bins),
    }


def _request(run: BenchRun, record: RequestRecord) -> dict[str, Any]:
    ttft = record.ttft_seconds
    return {
        "adapter": record.adapter,
        "arrived_seconds": round(record.arrived - run.start, 6),
        "queue_seconds": round(record.queue_seconds, 6),
        "ttft_seconds": None if ttft is None else round(ttft, 6),
        "e2e_seconds": round(record.e2e_seconds, 6),
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "stop_reason": record.stop_reason or None,
        "error": None if record.error is None else record.error._asdict(),
    }
