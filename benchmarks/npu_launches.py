"""Launches, bytes and operations of a step on Ascend, counted without a device, and the time that they predict.

    make npu-launches        (or, in its environment: python -m benchmarks.npu_launches)

Counted: everything that the server's runner and model start on the device for one step (benchmarks/npu_steps.py); the
sampler is not in it. Predicted, never measured: each launch takes the longer of its operations at 0.7 of the peak and
its bytes at 0.6 of the bandwidth, and 5 us for a matrix operator or 2 us for another one; launches follow each other.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.npu_steps import MODELS, Case, Part, kind_of, record_step
from tests.npu import bench

RESULTS = Path(__file__).parent / "results"
TERA, MICRO = 1e12, 1e-6
BANDWIDTH = 1.6 * 2**40
COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY = 0.7, 0.6
MATRIX_SECONDS, VECTOR_SECONDS = 5 * MICRO, 2 * MICRO
MATRIX_OPERATORS = (
    "npu_grouped_matmul", "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2",
    "npu_mla_prolog_v3", "aten.mm", "aten.bmm", "aten.addmm",
)  # fmt: skip
# bfloat16 peaks of Ascend/msmodeling's device profiles; all have 1.6 TiB/s. An A3 die has the numbers of an A2 NPU.
PEAKS = {"A2 280T, A3 560T die": 245.8 * TERA, "A2 313T": 294.9 * TERA, "A2 376T, A3 752T die": 353.9 * TERA}
DECODES = [Case(rows, adapters) for rows in (1, 32, 128) for adapters in (0, 1, 8, 32)]
CASES = [*DECODES, Case(32, 8, coverage=0.1), *(Case(2048, adapters, prefill=True) for adapters in (0, 1))]
# Of the models whose sizes the operator takes: the same by separate operators.
WITHOUT_PROLOG = [Case(rows, adapters, mla_prolog=False) for rows in (1, 32, 128) for adapters in (0, 8)]
DETAILED = (Case(32, 0), Case(32, 8), Case(32, 8, coverage=0.1), Case(2048, 1, prefill=True))


@dataclass(frozen=True)
class Total:
    """Sums over launches: how many are torch_npu's operators and how many PyTorch's own, bytes, operations, seconds."""

    operators: int = 0
    others: int = 0
    num_bytes: int = 0
    flops: int = 0
    launch_seconds: float = 0.0
    seconds: tuple[float, ...] = (0.0,) * len(PEAKS)

    def plus(self, other: Total, times: int = 1) -> Total:
        """The sum of this and several of the other."""
        return Total(
            self.operators + times * other.operators,
            self.others + times * other.others,
            self.num_bytes + times * other.num_bytes,
            self.flops + times * other.flops,
            self.launch_seconds + times * other.launch_seconds,
            tuple(mine + times * theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)),
        )


def predict(launch: bench.Launch) -> Total:
    """One launch, with the seconds predicted for each device."""
    moved = launch.bytes_read + launch.bytes_written
    start = MATRIX_SECONDS if launch.operator in MATRIX_OPERATORS else VECTOR_SECONDS
    seconds = tuple(
        start + max(launch.flops / (peak * COMPUTE_EFFICIENCY), moved / (BANDWIDTH * MEMORY_EFFICIENCY))
        for peak in PEAKS.values()
    )
    is_operator = launch.operator.startswith("npu_")
    return Total(int(is_operator), int(not is_operator), moved, launch.flops, start, seconds)


def total(launches: Iterable[bench.Launch]) -> Total:
    """The sum over launches."""
    result = Total()
    for launch in launches:
        result = result.plus(predict(launch))
    return result


def whole_step(parts: Iterable[Part]) -> Total:
    """The sum over all layers and what stands outside them."""
    result = Total()
    for part in parts:
        result = result.plus(total(part.launches), part.times)
    return result


def by_kind(launches: Iterable[bench.Launch]) -> dict[str, list[bench.Launch]]:
    """Launches by operator, the slowest first; LoRA's products apart."""
    kinds: dict[str, list[bench.Launch]] = defaultdict(list)
    for launch in launches:
        kinds[kind_of(launch)].append(launch)
    return dict(sorted(kinds.items(), key=lambda item: -total(item[1]).seconds[0]))


def cases_of(name: str) -> list[Case]:
    """The steps that are counted of a model."""
    return CASES + (WITHOUT_PROLOG if name == "V3 EP16" else [])


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "npu_launches", help="without .txt and .json")
    output: Path = parser.parse_args().output
    bench.install()
    steps = {name: {case: record_step(model, case) for case in cases_of(name)} for name, model in MODELS.items()}
    lines, about = [__doc__ or "", ""], _about()
    lines += [f"{name}: {value}" for name, value in about.items()]
    for name, cases in steps.items():
        lines += ["", "", f"# {MODELS[name].name}", "", *_summary(cases)]
        for case in DETAILED:
            lines += ["", f"## {name}, {case.label}", *_details(cases[case])]
    print(*lines, sep="\n")
    output.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    document = {"about": about, "models": {name: _as_data(cases) for name, cases in steps.items()}}
    output.with_suffix(".json").write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


def _about() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("torch", "torch_npu")}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"times": "predicted; no Ascend device was there", "date": date, **versions}


def _summary(cases: dict[Case, list[Part]]) -> list[str]:
    """One line a case: launches of a layer (operators + PyTorch's own) and of the step, and what they predict."""
    head = (
        f"{'':42}{'dense layer':>12}{'routed layer':>13}{'step':>12}{'GB':>7}{'TFLOP':>7}{'launch':>8}"
        "   predicted ms a step, tokens/s; added by adapters"
    )
    lines = [head, f"{'':93}{'ms':>8}   " + " | ".join(f"{name:22}" for name in PEAKS)]
    for case, parts in cases.items():
        base = whole_step(cases[replace(case, num_adapters=0, coverage=1.0)])
        step, names = whole_step(parts), {part.name: total(part.launches) for part in parts}
        dense = names.get("dense layer", names["first dense layer"])
        counts = "".join(f"{each.operators:>7}+{each.others:<5}" for each in (dense, names["routed layer"], step))
        times = " | ".join(
            f"{1e3 * mine:8.2f} {case.num_rows / mine:8.0f} {mine / plain - 1:+5.0%}"
            for mine, plain in zip(step.seconds, base.seconds, strict=True)
        )
        sums = f"{step.num_bytes / 1e9:7.1f}{step.flops / TERA:7.2f}{1e3 * step.launch_seconds:8.1f}"
        lines.append(f"{case.label:42}{counts:>37}{sums}   {times}")
    return lines


def _details(parts: list[Part]) -> list[str]:
    lines = [f"{'':42}{'times':>6}{'launches':>9}{'MB':>10}{'GFLOP':>10}   predicted us ({next(iter(PEAKS))})"]
    for part in parts:
        sums = total(part.launches)
        count = sums.operators + sums.others
        lines.append(f"{part.name:42}{part.times:>6}{count:>9}{_amounts(sums)}")
        if part.name in ("routed layer", "dense layer", "outside the layers"):
            for kind, launches in by_kind(part.launches).items():
                lines.append(f"    {kind:44}{len(launches):>9}{_amounts(total(launches))}")
    return lines


def _amounts(sums: Total) -> str:
    return f"{sums.num_bytes / 1e6:10.2f}{sums.flops / 1e9:10.2f}{sums.seconds[0] / MICRO:10.1f}"


def _as_data(cases: dict[Case, list[Part]]) -> dict[str, Any]:
    return {
        case.label: {
            "step": vars(whole_step(parts)),
            "parts": [
                {
                    "name": part.name,
                    "times": part.times,
                    "operators": {kind: _counts(each) for kind, each in by_kind(part.launches).items()},
                }
                for part in parts
            ],
        }
        for case, parts in cases.items()
    }


def _counts(launches: list[bench.Launch]) -> dict[str, int]:
    sums = total(launches)
    return {"launches": len(launches), "bytes": sums.num_bytes, "flops": sums.flops}


if __name__ == "__main__":
    main()
