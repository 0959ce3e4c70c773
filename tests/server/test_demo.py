"""The bundled demonstration, with the real engine: `graft demo` as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys

from runtime.env import child_environment
from tests.server.live import REPOSITORY

ROW = re.compile(r"^(\S+) +(\d+) +(\d+)% +([\d.]+) +([\d,]+)$", re.MULTILINE)


def test_the_demo_shows_adapters_that_are_right_and_a_base_that_is_not() -> None:
    command = [sys.executable, "-m", "runtime.cli", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=REPOSITORY, env=child_environment())
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "the server drained and stopped cleanly" in done.stdout
    rows = {name: (int(count), int(percent)) for name, count, percent, _, _ in ROW.findall(done.stdout)}
    assert sum(count for count, _ in rows.values()) == 64
    _, base = rows.pop("(base)")
    # Ten requests an adapter are too few to judge each; `test_demo_server` does, on all held-out rows.
    exact = sum(count * percent for count, percent in rows.values()) / sum(count for count, _ in rows.values())
    assert len(rows) >= 4 and base <= 20
    assert exact >= 90, rows
