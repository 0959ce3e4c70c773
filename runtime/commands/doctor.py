"""`graft doctor`: check and time every device operation, run the demo end to end, write one report."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from runtime.doctor import versions
from runtime.doctor.cases import Check, all_checks, operations
from runtime.doctor.collectives import COLLECTIVES, check_collectives
from runtime.doctor.demo import DEMO, SAMPLES_EACH, check_demo
from runtime.doctor.finding import Finding, found
from runtime.doctor.isolated import isolated_rows, worker_command
from runtime.doctor.report import Report, markdown, row_cells
from runtime.doctor.run import Row, run_checks
from runtime.doctor.shapes import REDUCTION
from runtime.doctor.training import TRAINING, check_training
from runtime.ops.base import Ops, make_ops
from runtime.ops.device_info import device_names
from runtime.ops.platform import open_device
from runtime.ops.told import replaced

# What one check may take on a CPU, so that the whole stays below 8 GiB.
CPU_CHECK_BYTES = 6 * 2**30
CANNOT_START = 2
SMALL_SAMPLES_EACH = 2
TRAINING_DTYPES = (torch.float32, torch.bfloat16)
OPERATIONS = "operations"
COLUMNS = ("STATUS", "OPERATION", "PHASE", "SHAPES", "DTYPE", "ERROR", "BOUND", "US", "GB/S", "TFLOP/S")
WIDTHS = (8, 20, 26, 12, 9, 8, 7, 12, 9, 9)
NUM_WORDS = 5


def run(options: argparse.Namespace) -> int:
    """0 if everything passed, 1 if something failed, 2 if the device or the report's place cannot be used."""
    try:
        device = open_device(options.device)
        path = _report_path(options.output, options.device)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"graft: {error}\n")
        return CANNOT_START
    scale = "small" if options.small else "full" if options.full else "normal"
    report = diagnose(device, make_ops(device), scale, shlex.join(["graft", *options.arguments]), path)
    _say("", f"{report.verdict}.", f"written: {path}")
    if not report.failed:
        return 0
    sys.stderr.write(f"graft: {len(report.failed)} failed: {'; '.join(report.failed)}\n")
    return 1


def diagnose(device: torch.device, ops: Ops, scale: str, command: str, path: Path) -> Report:
    """Do everything and write the report, again after every part, so that a lost process leaves what it had."""
    start = time.monotonic()
    report = Report(
        device.type,
        scale,
        command,
        datetime.now(UTC).isoformat(timespec="seconds"),
        versions.gather(device),
        versions.environment(),
        plain_operations(ops),
        REDUCTION if device.type == "cpu" and scale == "normal" else "",
    )
    report.unfinished = [OPERATIONS, DEMO, TRAINING, COLLECTIVES]
    for label, value in report.versions.items():
        _say(f"{label}: {value}")

    def done() -> None:
        report.unfinished.pop(0)
        report.replaced = sorted({*report.replaced, *(f"{operator}: {reason}" for operator, reason in replaced())})
        report.seconds = time.monotonic() - start
        path.write_text(markdown(report), encoding="utf-8")

    path.write_text(markdown(report), encoding="utf-8")
    _say("", _line(COLUMNS))
    for row in _rows(all_checks(device, scale), ops, device, scale):
        report.rows.append(row)
        report.replaced += row.replaced
        _say(_line(row_cells(row)), *([f"          {row.remark}"] if row.remark else []))
    done()
    for findings in _parts(device, ops, scale):
        report.findings += findings
        for finding in findings:
            facts = (f"  {name} {value}" for name, value in finding.facts.items())
            _say("", f"{finding.status}: {finding.name}", *facts)
            _say(*([f"  {finding.note}"] if finding.note else []))
        done()
    return report


def _rows(checks: list[Check], ops: Ops, device: torch.device, scale: str) -> Iterator[Row]:
    """On an accelerator in processes of their own: a kernel's fault can take the process or the device with it."""
    if device.type != "cpu":
        return isolated_rows(checks, worker_command(device.type, scale))
    return run_checks(checks, ops, device, None if scale == "full" else CPU_CHECK_BYTES)


def _parts(device: torch.device, ops: Ops, scale: str) -> Iterator[list[Finding]]:
    samples_each = SMALL_SAMPLES_EACH if scale == "small" else SAMPLES_EACH
    yield found(DEMO, lambda: check_demo(device.type, samples_each))
    yield found(TRAINING, lambda: check_training(ops, device, TRAINING_DTYPES))
    yield found(COLLECTIVES, lambda: [check_collectives(device.type, len(device_names(device)))])


def plain_operations(ops: Ops) -> list[str]:
    """Operations of the table that compute and that a back-end has no form of its own of."""
    return [name for name in operations() if getattr(type(ops), name) is getattr(Ops, name)]


def _report_path(asked: Path | None, device: str) -> Path:
    """Where the report goes; raises ValueError before the work rather than after it."""
    path = asked or Path(f"graft-doctor-{device}-{datetime.now(UTC):%Y%m%d-%H%M%S}.md")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.absolute().parent}")
    return path


def _line(cells: Sequence[str]) -> str:
    """One line of the table on the terminal, which is printed as the checks are done."""
    words = [cell.ljust(width) if index < NUM_WORDS else cell.rjust(width)
             for index, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))]  # fmt: skip
    return "  ".join(words).rstrip()


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.flush()
