"""`graft train`: a training run on this host, with as many processes as its configuration says."""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
import time

from loaders.tokenizer import Tokenizer
from runtime.commands.publish import publish
from runtime.distributed.mesh import MeshShape
from runtime.env import child_environment, is_started_by_torchrun, processes_environment
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.__main__ import train
from runtime.trainer.config import TrainConfig
from runtime.trainer.config_file import ConfigError, read_config
from runtime.trainer.data.documents import read_documents
from runtime.trainer.mesh_shape import mesh_shape
from runtime.trainer.model import check_base_fits
from runtime.trainer.plan import plan_run
from runtime.trainer.report.dry_run import describe_run
from runtime.trainer.results import ADAPTER
from runtime.trainer.step_data import mean_row

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """Train, or say what would be trained; then hand the adapter to a server if asked."""
    if bool(options.publish) != bool(options.name):
        raise ConfigError("--publish HOST:PORT and --name NAME go together")
    config = read_config(options.config, options.set)
    if options.dry_run:
        sys.stdout.write(_describe(config) + "\n")
        return 0
    status = _train(options, config)
    if status == 0 and options.publish:
        sys.stdout.write(publish(options.publish, options.name, config.output / ADAPTER) + "\n")
    return status


def _describe(config: TrainConfig) -> str:
    """The whole plan; reads the data and the base's config, but no weight."""
    base = DeepseekConfig.from_dir(config.model)
    check_base_fits(config, base)
    documents, report = read_documents(config.data.train, config.data, Tokenizer.from_dir(config.model))
    tokens, targets = mean_row(config, documents)
    lines = [f"Data: {report.describe()}", "", describe_run(plan_run(base, config, tokens, targets))]
    if config.selection is not None:
        lines += ["", "selection leaves experts out before training; the numbers above count all of them"]
    return "\n".join(lines)


def _train(options: argparse.Namespace, config: TrainConfig) -> int:
    shape: MeshShape = mesh_shape(config.parallel)
    if is_started_by_torchrun():
        raise ConfigError("under torchrun, start `-m runtime.trainer CONFIG.yaml` instead of `graft train`")
    if shape.num_processes == 1:
        return train(options.config, options.set, options.resume)
    command = [sys.executable, "-m", "runtime.trainer", str(options.config)]
    command += [f"--set={override}" for override in options.set]
    if options.resume is not None:
        command.append(f"--resume={options.resume}")
    environments = processes_environment(child_environment(), shape.num_processes)
    return _supervise([subprocess.Popen(command, env=environment) for environment in environments])


def _supervise(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails, the others have a moment to tell their part and are ended."""
    deadline = None
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = deadline or time.monotonic() + GRACE_SECONDS
                if time.monotonic() > deadline:
                    break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        for process in processes:
            process.send_signal(signal.SIGINT)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    killed = [(rank, process) for rank, process in enumerate(processes) if process.wait() < 0]
    for rank, process in killed:
        if deadline is None:
            sys.stderr.write(f"graft train: process {rank} was ended by signal {-process.returncode}\n")
    return int(any(process.returncode for process in processes))

