"""Checks in processes of their own: what ends or hangs one costs one check, and the others still come."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from runtime.doctor.cases import all_checks
from runtime.doctor.isolated import DEVICE_LOST, MARK, MAX_PROCESSES, isolated_rows, worker_command
from runtime.doctor.run import FAILED, PASSED

CHECKS = all_checks(torch.device("cpu"), "small")[:6]

# Check 1 is a segmentation fault, 3 hangs, 4 fails and takes the device with it; the others pass.
WORKER = f"""
import json, os, signal, sys, time
names = {[check.name for check in CHECKS]!r}
for index in range(int(sys.argv[1]), len(names)):
    if index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if index == 3:
        time.sleep(60)
    row = dict(name=names[index], operation="", phase="", shapes="", dtype="", detail="")
    row["status"] = "failed" if index == 4 else "passed"
    print("a library says something")
    print({MARK!r} + json.dumps(row), flush=True)
    if index == 4:
        sys.exit({DEVICE_LOST})
"""


def _worker(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(text, encoding="utf-8")
    return [sys.executable, str(path)]


def test_a_process_that_dies_hangs_or_loses_its_device_costs_its_own_check(tmp_path: Path) -> None:
    rows = list(isolated_rows(CHECKS, _worker(tmp_path, WORKER), limit_seconds=2.0))
    assert [row.name for row in rows] == [check.name for check in CHECKS]
    assert [row.status for row in rows] == [PASSED, FAILED, PASSED, FAILED, FAILED, PASSED]
    assert rows[1].note == "the process was ended by signal 11 (Segmentation fault)"
    assert rows[3].note == "the process gave no answer within 2 s and was ended"
    assert rows[4].note == ""


def test_a_worker_that_never_starts_ends_the_tries_and_every_check_has_a_row(tmp_path: Path) -> None:
    checks = all_checks(torch.device("cpu"), "small")
    rows = list(isolated_rows(checks, _worker(tmp_path, "raise SystemExit(3)"), limit_seconds=5.0))
    assert len(rows) == len(checks) and {row.status for row in rows} == {FAILED}
    assert rows[0].note == "the process ended with status 3"
    assert rows[-1].note == f"not run: {MAX_PROCESSES} processes ended before it"


def test_the_real_worker_goes_on_from_the_check_that_it_is_told() -> None:
    checks = all_checks(torch.device("cpu"), "small")
    command = [*worker_command("cpu", "small"), str(len(checks) - 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert [row["name"] for row in rows] == [check.name for check in checks[-2:]]
    assert {row["status"] for row in rows} == {PASSED}
