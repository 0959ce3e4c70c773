"""`graft train`: a training run on this host, with as many processes as its configuration says."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from runtime.env import child_environment, is_started_by_torchrun, processes_environment
from runtime.trainer.config import ADAPTER, TrainConfig
from runtime.trainer.config_file import ConfigError, read_config

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0


def run(options: argparse.Namespace) -> int:
    """Train, or say what would be trained; then hand the adapter to a server if asked."""
    if bool(options.publish) != bool(options.name):
        raise ConfigError("--publish HOST:PORT and --name NAME go together")
    if options.publish and options.dry_run:
        raise ConfigError("--dry-run trains nothing that --publish could load: leave one of them out")
    config = read_config(options.config, options.set)
    if options.dry_run:
        from runtime.trainer.report.dry_run import describe  # torch takes seconds to import

        sys.stdout.write(describe(config) + "\n")
        return 0
    if options.publish:
        from runtime.commands.publish import check_can_publish, publish

        check_can_publish(options.publish, options.name)
    status = _train(options, config)
    if status == 0 and options.publish:
        sys.stdout.write(publish(options.publish, options.name, config.output / ADAPTER) + "\n")
    return status


def _train(options: argparse.Namespace, config: TrainConfig) -> int:
    num_processes = config.parallel.num_processes
    if is_started_by_torchrun():
        raise ConfigError("under torchrun, start `-m runtime.trainer CONFIG.yaml` instead of `graft train`")
    if num_processes == 1:
        from runtime.trainer.__main__ import train  # torch, which a process that only starts others does not need

        return train(options.config, options.set, options.resume, overwrite=options.overwrite)
    command = [sys.executable, "-m", "runtime.trainer", str(options.config), f"--parent={os.getpid()}"]
    command += [f"--set={override}" for override in options.set]
    if options.resume is not None:
        command.append(f"--resume={options.resume}")
    if options.overwrite:
        command.append("--overwrite")
    environments = processes_environment(child_environment(), num_processes)
    return _supervise([subprocess.Popen(command, env=environment) for environment in environments])


def _supervise(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails, the others have a moment to tell their part and are ended, as on SIGTERM."""
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    failed: int | None = None
    deadline = float("inf")
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            if failed is None and (failed := _failed(processes)) is not None:
                deadline = time.monotonic() + GRACE_SECONDS
            time.sleep(POLL_SECONDS)
        failed = _failed(processes) if failed is None else failed
    finally:
        _end(processes)
        signal.signal(signal.SIGTERM, previous)
    if failed is not None and (number := -processes[failed].returncode) > 0:
        sys.stderr.write(f"graft train: process {failed} was ended by signal {number} "
                         f"({signal.strsignal(number)}); --resume goes on from the newest checkpoint\n")  # fmt: skip
    return int(any(process.returncode for process in processes))


def _failed(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The rank of a process that failed, one that a signal ended before those that only lost it."""
    codes = {rank: code for rank, process in enumerate(processes) if (code := process.poll())}
    return min(codes, key=lambda rank: (codes[rank] > 0, rank)) if codes else None


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Checkpoints and adapters appear whole or not at all, so a process can be ended at any time."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _exit_on_signal(number: int, _frame: object) -> None:
    sys.exit(128 + number)

