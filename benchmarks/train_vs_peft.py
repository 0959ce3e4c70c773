"""Training rank-16 LoRA on all routed experts: Graft's trainer against transformers + PEFT, in speed and memory.

    python -m benchmarks.train_vs_peft [--tiny] [--threads N] [--models DIR] [--results DIR]

Same model, rows, optimizer, machine and memory limit; every run is a process of its own, so that its peak memory is its
own. First each side's ways (dtype, and how PEFT's side computes experts) are tried for one step after warm-up; a trial
that takes twice as long in all as a faster one is given up, and a way that was twice as slow is not tried at the larger
batch. The fastest way of a side at a batch is the one whose trial step took the least time. Then both sides' fastest
run in turn, and the median of all their steps counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.make_model import DEFAULT_OUT, FULL, TINY, base_dir, make_all
from benchmarks.train_side import DTYPES, MAX_GIB, SideResult

EXPERTS = ("grouped_mm", "eager", "batched_mm")
BATCHES = (1, 4)
ASKED_SPEED = {1: 3.0, 4: 2.0}
ASKED_MEMORY = 0.8
GIVEN_UP_FROM = 2.0  # a trial this many times slower than the fastest is ended, and not made at the next batch
LEAST_TRIAL_SECONDS = 30.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Way:
    """How a side computes; `experts` is for PEFT's side alone."""

    side: str
    dtype: str
    experts: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}, {self.experts}" if self.experts else self.dtype


WAYS = {
    "peft": [Way("peft", dtype, experts) for experts in EXPERTS for dtype in DTYPES],
    "graft": [Way("graft", dtype) for dtype in DTYPES],
}


@dataclass(frozen=True)
class Trial:
    """Seconds of the step of a way's trial; where there are none, `why`: it failed, was given up or not tried."""

    seconds: float | None
    why: str = ""

    def __str__(self) -> str:
        return self.why if self.seconds is None else f"{self.seconds:.2f} s"


@dataclass
class Comparison:
    """One batch size: what became of each way in the trial, and each side's full runs."""

    batch: int
    trials: dict[str, dict[str, Trial]] = field(default_factory=dict)
    runs: dict[str, list[SideResult]] = field(default_factory=dict)


def main() -> None:
    """Command line: see the module's text."""
    arguments = _parse()
    load_at_start = os.getloadavg()[0]  # well above 0: others were computing, so look at the spread of the steps
    out = arguments.models / ("tiny" if arguments.tiny else "full")
    make_all(out, TINY if arguments.tiny else FULL)
    ways = {side: WAYS[side] for side in (["peft"] if arguments.peft_only else list(WAYS))}
    comparisons = []
    for batch in BATCHES:
        comparison, ways = compare(base_dir(out), batch, ways, arguments)
        comparisons.append(comparison)
    raw = {"comparisons": [asdict(comparison) for comparison in comparisons]}
    if arguments.peft_only:
        print(json.dumps(raw, indent=1))
        return
    described = machine.describe() | {"threads": arguments.threads, "load_at_start": f"{load_at_start:.2f}"}
    described["memory_limit_gib"] = f"{arguments.max_gib:g} for each process of either side"
    about = {"model": "tiny" if arguments.tiny else "0.79 B", "machine": described}
    report = summarise(comparisons) | about
    text = as_text(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = "train_vs_peft_tiny" if arguments.tiny else "train_vs_peft"
    (arguments.results / f"{stem}.json").write_text(json.dumps(report | raw, indent=1) + "\n", encoding="utf-8")
    (arguments.results / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")


def compare(
    model: Path, batch: int, ways: dict[str, list[Way]], arguments: argparse.Namespace
) -> tuple[Comparison, dict[str, list[Way]]]:
    """Try the ways, run each side's fastest in turn; gives also the ways that are worth a trial at a larger batch."""
    comparison, fastest, promising = Comparison(batch), {}, {}
    for side, candidates in ways.items():
        trials = _trials(model, batch, candidates, arguments)
        left_out = [way for way in WAYS.get(side, []) if way not in candidates]
        skipped = {str(way): Trial(None, "not tried: far slower or failed at the smaller batch") for way in left_out}
        comparison.trials[side] = {str(way): trial for way, trial in trials.items()} | skipped
        done = {way: trial.seconds for way, trial in trials.items() if trial.seconds is not None}
        if not done:
            raise SystemExit(f"{side} at batch {batch}: no way worked; see the messages above")
        fastest[side] = min(done, key=lambda way: done[way])
        promising[side] = [way for way in done if done[way] < GIVEN_UP_FROM * done[fastest[side]]]
    for _ in range(arguments.rounds):
        for side, way in fastest.items():
            result = _run(model, batch, way, arguments, arguments.steps, arguments.max_seconds)
            if isinstance(result, str):
                raise SystemExit(f"{side} ({way}) at batch {batch}: {result}")
            comparison.runs.setdefault(side, []).append(result)
            seconds_each = ", ".join(f"{value:.2f}" for value in result.seconds_per_step)
            print(f"batch {batch}, {side} ({way}): {seconds_each} s/step, {_gib(result.peak_bytes)}", flush=True)
    return comparison, promising


def _trials(model: Path, batch: int, ways: list[Way], arguments: argparse.Namespace) -> dict[Way, Trial]:
    """One step each, after warm-up."""
    trials: dict[Way, Trial] = {}
    limit = arguments.max_seconds
    for way in ways:
        begin = time.perf_counter()
        result = _run(model, batch, way, arguments, 1, limit)
        if isinstance(result, str):
            trials[way] = Trial(None, result)
        else:
            trials[way] = Trial(result.seconds_per_step[0])
            limit = min(limit, max(LEAST_TRIAL_SECONDS, GIVEN_UP_FROM * (time.perf_counter() - begin)))
        print(f"batch {batch}, {way.side} tries {way}: {trials[way]}", flush=True)
    return trials


def _run(
    model: Path, batch: int, way: Way, arguments: argparse.Namespace, steps: int, max_seconds: float
) -> SideResult | str:
    """Run one process; a sentence if it failed, or took longer than `max_seconds` in all."""
    command = [sys.executable, "-m", f"benchmarks.train_{way.side}_side", "--model", str(model)]
    command += ["--dtype", way.dtype, "--batch", str(batch), "--steps", str(steps), "--threads", str(arguments.threads)]
    command += ["--length", str(arguments.length), "--max-gib", str(arguments.max_gib)]
    command += ["--experts", way.experts] if way.experts else []
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"given up after {max_seconds:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return f"failed: {lines[-1][:200]}"
    return SideResult.parse(done.stdout.strip().splitlines()[-1])


def summarise(comparisons: list[Comparison]) -> dict[str, Any]:
    """For each batch: tokens/s of both sides (median step), their ratios, and the losses side by side."""
    batches = {}
    for comparison in comparisons:
        sides = {side: _side(runs) for side, runs in comparison.runs.items()}
        graft, peft = sides["graft"], sides["peft"]
        batches[str(comparison.batch)] = {
            "sides": sides,
            "speed_ratio": graft["tokens_per_second"] / peft["tokens_per_second"],
            "memory_ratio": graft["peak_bytes"] / peft["peak_bytes"],
            "training_memory_ratio": _ratio(graft["training_peak_bytes"], peft["training_peak_bytes"]),
            "trials": {
                side: {way: asdict(trial) for way, trial in trials.items()}
                for side, trials in comparison.trials.items()
            },
        }
    return {"length": comparisons[0].runs["peft"][0].length, "batches": batches}


def _side(runs: list[SideResult]) -> dict[str, Any]:
    first = runs[0]
    step = statistics.median(seconds for run in runs for seconds in run.seconds_per_step)
    training = [run.training_peak_bytes for run in runs if run.training_peak_bytes is not None]
    return {
        "way": str(Way(first.side, first.dtype, first.experts)),
        "seconds_per_step": step,
        "tokens_per_second": first.batch * first.length / step,
        "peak_bytes": statistics.median(run.peak_bytes for run in runs),
        "training_peak_bytes": statistics.median(training) if training else None,
        "trainable_parameters": first.trainable_parameters,
        "losses": first.losses,
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [
        f"LoRA of rank 16 on all routed experts, rows of {report['length']} tokens, AdamW; model: {report['model']}",
        "",
    ]
    for batch, result in report["batches"].items():
        lines += [f"batch {batch}", *_batch_lines(int(batch), result), ""]
    lines += [
        "  The losses guard against timing two computations that differ: B starts at zero, so the first must agree as",
        "  far as the compute dtype goes; later ones differ a little, since each side draws its own A.",
        "",
    ]
    return "\n".join([*lines, *(f"  {name}: {value}" for name, value in report["machine"].items())])


def _batch_lines(batch: int, result: dict[str, Any]) -> list[str]:
    lines = []
    for side, numbers in result["sides"].items():
        lines.append(
            f"  {side:<6} {numbers['tokens_per_second']:>8.1f} tokens/s  {numbers['seconds_per_step']:>7.2f} s/step  "
            f"peak {_gib(numbers['peak_bytes'])}, after loading {_gib(numbers['training_peak_bytes'])}  "
            f"({numbers['way']}; {numbers['trainable_parameters'] / 1e6:.2f} M trainable)"
        )
    lines += [
        f"  speed, Graft to PEFT:        {result['speed_ratio']:.2f}x   asked >= {ASKED_SPEED[batch]}x",
        f"  peak memory, Graft to PEFT:  {result['memory_ratio']:.2f}    asked <= {ASKED_MEMORY}",
    ]
    if result["training_memory_ratio"] is not None:
        lines.append(f"  the same after loading:      {result['training_memory_ratio']:.2f}")
    for side, numbers in result["sides"].items():
        lines.append(f"  losses, {side:<6} " + " ".join(f"{loss:8.4f}" for loss in numbers["losses"]))
    for side, trials in result["trials"].items():
        lines.append(f"  one step of {side}, the way with the least time being its fastest:")
        lines += [f"    {way}: {Trial(**trial)}" for way, trial in trials.items()]
    return lines


def _gib(num_bytes: float | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--peft-only", action="store_true", help="measure PEFT's side alone and print its numbers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, in turn")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after two that warm up")
    parser.add_argument("--max-gib", type=float, default=MAX_GIB, help="of memory for each process, then it fails")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="of one process, before giving up")
    return parser.parse_args()


if __name__ == "__main__":
    main()
