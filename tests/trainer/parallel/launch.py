"""Starting the processes of a test's job and waiting for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.trainer.parallel.worker import Run

ROOT = Path(__file__).parents[3]


def run_job(runs: Sequence[Run], num_processes: int, folder: Path, *, timeout: float = 240) -> list[int]:
    """Exit statuses of all processes."""
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / f"job-{len(list(folder.glob('job-*.json')))}.json"
    job.write_text(json.dumps([asdict(run) for run in runs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "GRAFT_LOG_LEVEL": "ERROR",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.trainer.parallel.worker", str(job)]
        log = (folder / f"{job.stem}-{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def logs(folder: Path) -> str:
    """What the processes printed, for a failing test's message."""
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
