"""Train the demo adapters: `graft train` on each file of examples/adapters, results into runtime/demo/adapters."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from demo_tasks import REPOSITORY, TRAIN_DIR, write_tasks

from runtime.cli import main as graft

CONFIGS_DIR = Path(__file__).resolve().parent / "adapters"
ADAPTERS_DIR = REPOSITORY / "runtime" / "demo" / "adapters"
RUNS_DIR = REPOSITORY / "build" / "demo-adapters"
TRAIN_ROWS = 8000


def train_adapter(task: str, out: Path) -> float:
    """One run, from nothing, and its adapter in the folder `out`; returns the run's seconds."""
    run = RUNS_DIR / task
    shutil.rmtree(run, ignore_errors=True)
    start = time.monotonic()
    if graft(["train", str(CONFIGS_DIR / f"{task}.yaml"), "--set", f"output={run.relative_to(REPOSITORY)}"]):
        sys.exit(f"{task} was not trained")
    seconds = time.monotonic() - start
    shutil.rmtree(out / task, ignore_errors=True)
    shutil.copytree(run / "adapter", out / task)
    return seconds


def main() -> None:
    """Train the named adapters, or all; run it from the repository's root, which the configurations' paths start at."""
    known = sorted(path.stem for path in CONFIGS_DIR.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="names of tasks; all when none is given")
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR)
    args = parser.parse_args()
    unknown = set(args.tasks) - set(known)
    if unknown:
        parser.error(f"unknown tasks {sorted(unknown)}; choose from {known}")
    if Path.cwd() != REPOSITORY:
        parser.error(f"run it from {REPOSITORY}")
    write_tasks(TRAIN_DIR, TRAIN_ROWS, seed=1, held_out=False)
    for task in args.tasks or known:
        print(f"{task}: {train_adapter(task, args.out):.0f} s", flush=True)


if __name__ == "__main__":
    main()
