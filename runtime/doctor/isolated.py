"""The checks in a process of their own: one that ends or hangs costs its check, and the next process goes on after it.

`python -m runtime.doctor.isolated DEVICE SCALE FIRST` runs the checks from number FIRST on, a line for each.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from runtime.doctor.cases import Check, all_checks
from runtime.doctor.run import FAILED, Row, row_of, run_checks
from runtime.env import child_environment, configure_logging
from runtime.ops.base import make_ops
from runtime.ops.device_info import synchronise
from runtime.ops.platform import open_device

MARK = "graft-doctor-row "
LIMIT_SECONDS = 180.0
MAX_PROCESSES = 12
# The exit status of a process whose device does not answer any more after a failed check.
DEVICE_LOST = 75


@dataclass(frozen=True)
class _End:
    """The process closed its output."""


def isolated_rows(
    checks: Sequence[Check], command: Sequence[str], limit_seconds: float = LIMIT_SECONDS
) -> Iterator[Row]:
    """A row for each check, from `command` with the number of the first check added; `limit_seconds` for each."""
    index = 0
    for _ in range(MAX_PROCESSES):
        if index == len(checks):
            return
        process = subprocess.Popen(
            [*command, str(index)], stdout=subprocess.PIPE, text=True, errors="replace", env=child_environment()
        )
        try:
            lines = _lines(process)
            while isinstance(line := _next(lines, limit_seconds), str):
                if line.startswith(MARK):
                    yield Row(**json.loads(line.removeprefix(MARK)))
                    index += 1
        finally:
            process.kill()
            status = process.wait()
        if index < len(checks) and status != DEVICE_LOST:
            yield row_of(checks[index])(detail="", status=FAILED, note=_why(line, status, limit_seconds))
            index += 1
    for check in checks[index:]:
        yield row_of(check)(detail="", status=FAILED, note=f"not run: {MAX_PROCESSES} processes ended before it")


def _lines(process: subprocess.Popen[str]) -> queue.SimpleQueue[str | _End]:
    found: queue.SimpleQueue[str | _End] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout or ():
            found.put(line)
        process.wait()
        found.put(_End())

    threading.Thread(target=read, daemon=True).start()
    return found


def _next(lines: queue.SimpleQueue[str | _End], limit_seconds: float) -> str | _End | None:
    """The next line; None if the time is over."""
    try:
        return lines.get(timeout=limit_seconds)
    except queue.Empty:
        return None


def _why(last: str | _End | None, status: int, limit_seconds: float) -> str:
    if last is None:
        return f"the process gave no answer within {limit_seconds:.0f} s and was ended"
    if status < 0:
        return f"the process was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"the process ended with status {status}"


def worker_command(device: str, scale: str) -> list[str]:
    """What `isolated_rows` starts."""
    return [sys.executable, "-m", "runtime.doctor.isolated", device, scale]


def _main(device_name: str, scale: str, first: int) -> int:
    configure_logging()
    device = open_device(device_name)
    checks = all_checks(device, scale)[first:]
    for row in run_checks(checks, make_ops(device), device):
        sys.stdout.write(MARK + json.dumps(asdict(row)) + "\n")
        sys.stdout.flush()
        if row.status == FAILED and not _answers(device):
            return DEVICE_LOST
    return 0


def _answers(device: torch.device) -> bool:
    """Whether the device still computes; after a fault of a kernel some do not."""
    try:
        total = (torch.ones(16, device=device) + 1).sum().item()
        synchronise(device)
    except RuntimeError:
        return False
    return total == 32


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
