"""A thousand registered adapters over sixteen places on the device: every answer right, no wait beyond the bound.

    python -m benchmarks.many_adapters [--adapters N] [--slots N] [--rate N] [--seconds N] [--results DIR]

The base and its adapters are small and tell in their output which adapter ran (`marked_model`); what is measured is the
moving of adapters between disk, host memory and device, not the model. Host memory holds a tenth of the adapters.
Requests arrive at a fixed rate whatever the server does, for adapter k with a chance of 1 / (k + 1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.many_adapters_traffic import Answers, Traffic, run, write_adapters
from benchmarks.marked_model import write_base
from benchmarks.served_process import serving
from runtime.bench.statistics import percentile

MAX_WAIT_SECONDS = 30.0
# Memory is flat if the last tenth of the run takes no more than the first one by either of these.
MAX_GROWTH_RATIO, MAX_GROWTH_BYTES = 0.02, 20 * 2**20
SHARE_OF_RUN = 10
ADAPTER_BYTES = 220_096  # on the device and in host memory
HOST_SHARE = 10
GIB = 2**30
COUNTED = {
    "hits on the device": 'graft_adapter_hits_total{tier="device"}',
    "hits in host memory": 'graft_adapter_hits_total{tier="host"}',
    "loads to the device": 'graft_adapter_loads_total{tier="device"}',
    "loads to host memory": 'graft_adapter_loads_total{tier="host"}',
    "evictions from the device": 'graft_adapter_evictions_total{tier="device"}',
    "evictions from host memory": 'graft_adapter_evictions_total{tier="host"}',
}


def measure(folder: Path, traffic: Traffic, num_slots: int) -> dict[str, Any]:
    """Write everything below `folder`, serve it, and report."""
    base, root = write_base(folder / "base"), folder / "adapters"
    write_adapters(root, traffic.num_adapters)
    host_bytes = max(2 * num_slots, traffic.num_adapters // HOST_SHARE) * ADAPTER_BYTES
    flags = (
        *("--dtype", "float32", "--max-model-len", "64", "--max-adapters", str(num_slots)),
        *("--adapter-memory-gib", str((num_slots + 1) * ADAPTER_BYTES / GIB)),
        *("--adapter-host-memory-gib", str(host_bytes / GIB)),
        *("--max-adapter-wait-seconds", str(MAX_WAIT_SECONDS)),
    )
    with serving(base, root, *flags) as server:
        answers = asyncio.run(run(server, traffic))
    return report_of(answers, traffic, num_slots, host_bytes)


def report_of(answers: Answers, traffic: Traffic, num_slots: int, host_bytes: int) -> dict[str, Any]:
    """All that is to be told."""
    waits = sorted(answers.waits_seconds)
    return {
        "traffic": asdict(traffic),
        "slots": num_slots,
        "host_bytes": host_bytes,
        "requests": len(waits),
        "right": answers.num_right,
        "wrong": answers.wrong[:20],
        "errors": dict(answers.errors),
        "adapters_named": len(answers.adapters),
        "wait_seconds": {f"p{percent:g}": percentile(waits, percent) for percent in (50, 90, 99, 100)},
        "counts": {
            name: answers.after.get(series, 0) - answers.before.get(series, 0) for name, series in COUNTED.items()
        },
        "memory": growth(answers.memory),
        "raw": {"waits_seconds": waits, "memory_bytes": answers.memory},
    }


def growth(samples: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """Of each process the mean over the first and the last tenth of the samples, in MiB, and whether it is flat."""
    tenth = max(1, len(samples) // SHARE_OF_RUN)
    told = {}
    for name in samples[-1]:
        first, last = (
            statistics.fmean(sample.get(name, 0) for sample in part) for part in (samples[:tenth], samples[-tenth:])
        )
        is_flat = last - first <= MAX_GROWTH_BYTES or last <= first * (1 + MAX_GROWTH_RATIO)
        told[name] = {"first_mib": first / 2**20, "last_mib": last / 2**20, "flat": float(is_flat)}
    return told


def as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    traffic, waits = report["traffic"], report["wait_seconds"]
    lines = [
        f"{traffic['num_adapters']} registered adapters, {report['slots']} places on the device, host memory for "
        f"{report['host_bytes'] // ADAPTER_BYTES}",
        f"{traffic['rate_per_second']:g} requests/s (Poisson, Zipf {traffic['zipf']:g}) for {traffic['seconds']:g} s "
        f"after {traffic['warm_up_seconds']:g} s of warm-up, {traffic['num_new_tokens']} tokens each",
        "",
        f"  requests                    {report['requests']:>9}   {report['right']} right, "
        f"{len(report['wrong'])} wrong, {sum(report['errors'].values())} errors",
        f"  different adapters named    {report['adapters_named']:>9}",
        f"  wait for the first token, s {waits['p100']:>9.3f}   the longest; asked <= {MAX_WAIT_SECONDS:g}; "
        f"p50 {waits['p50']:.3f}, p90 {waits['p90']:.3f}, p99 {waits['p99']:.3f}",
    ]
    lines += [f"  {name:<27} {count:>9.0f}" for name, count in report["counts"].items()]
    asked = f"asked <= {MAX_GROWTH_RATIO:.0%} or {MAX_GROWTH_BYTES // 2**20} MiB more"
    for name, seen in report["memory"].items():
        change = seen["last_mib"] - seen["first_mib"]
        lines.append(f"  {name:<27} {seen['last_mib']:>9.1f}   MiB resident, {change:+.1f} over the run; {asked}")
    return "\n".join([*lines, *(f"  {name}: {count}" for name, count in report["errors"].items())])


def main() -> None:
    """Command line: see the module's text."""
    arguments = _parse()
    traffic = Traffic(arguments.adapters, arguments.rate, arguments.warm_up, arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), traffic, arguments.slots)
    report["machine"] = machine.describe()
    text = "\n".join([as_text(report), "", *(f"  {name}: {value}" for name, value in report["machine"].items())])
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "many_adapters.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    (arguments.results / "many_adapters.txt").write_text(text + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rate", type=float, default=30.0, help="requests per second")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
