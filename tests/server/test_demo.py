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
    exact = {name: int(percent) for name, _, percent, _, _ in ROW.findall(done.stdout)}
    base = exact.pop("(base)")
    assert len(exact) >= 4
    assert min(exact.values()) >= 90, exact
    assert base <= 20
    assert sum(int(count) for _, count, *_ in ROW.findall(done.stdout)) == 64
