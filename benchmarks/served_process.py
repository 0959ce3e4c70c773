"""`graft serve` as a process of its own, for benchmarks: its addresses, its metrics, the memory of its processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.env import child_environment

READY = re.compile(r"ready: grpc (\S+), admin (\S+), http (\S+)")
FREE_PORTS = ("--grpc-port", "0", "--admin-port", "0", "--http-port", "0", "--drain-delay", "0")
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class ServedProcess:
    """A server that runs."""

    pid: int
    address: str
    admin_address: str
    http_address: str

    def metrics(self) -> dict[str, float]:
        """Every series of /metrics, by its name and labels without that of the model."""
        with urllib.request.urlopen(f"http://{self.http_address}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {re.sub(r'model_name="[^"]*",?', "", name).replace("{}", ""): float(value) for name, value in pairs}

    def resident_bytes(self) -> dict[str, int]:
        """Memory that each of its processes holds, by what it runs."""
        found: dict[str, int] = {}
        for pid in _family(self.pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
            except OSError:
                continue  # it has just ended
            name = command[command.index("-m") + 1] if "-m" in command else command[0]
            found[name] = found.get(name, 0) + pages * os.sysconf("SC_PAGE_SIZE")
        return found


@contextmanager
def serving(model: Path, root: Path, *flags: str) -> Iterator[ServedProcess]:
    """Start `graft serve` on free ports, and end it."""
    command = [sys.executable, "-m", "runtime.cli", "serve", str(model), "--adapters-root", str(root), *FREE_PORTS]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env=child_environment())
    try:
        line = process.stdout.readline() if process.stdout else ""
        match = READY.match(line)
        if match is None:
            raise RuntimeError(f"the server did not start; it said {line!r}")
        yield ServedProcess(process.pid, *match.groups())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _family(pid: int) -> list[int]:
    """A process and all that came from it."""
    family = [pid]
    for parent in family:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            family += [int(child) for child in task.read_text(encoding="ascii").split()]
    return family
