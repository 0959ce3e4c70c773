"""One process of a training run: `torchrun --nproc-per-node N -m runtime.trainer CONFIG.yaml`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.distributed.mesh import (
    MetByAll,
    check_process_count,
    is_lost_connection,
    make_mesh,
    start_processes,
    stop_processes,
)
from runtime.distributed.parent import end_with_parent
from runtime.env import configure_logging, num_local_processes, process_rank
from runtime.errors import GraftError
from runtime.ops.platform import bind_process, open_device
from runtime.trainer.checkpoint import CheckpointProblem
from runtime.trainer.config import TrainConfig
from runtime.trainer.config_file import ConfigError, read_config
from runtime.trainer.failures import describe_failure
from runtime.trainer.loop import Diverged, Training
from runtime.trainer.replicas import ReplicasDiffer
from runtime.trainer.stage import mesh_shape

_MET_BY_ALL = (MetByAll, ConfigError, CheckpointProblem, Diverged, ReplicasDiffer)

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the run is done, 1 after a sentence that says what to change."""
    parser = argparse.ArgumentParser(prog="python -m runtime.trainer", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", nargs="?", const="latest", metavar="CHECKPOINT",
                       help="go on from the newest checkpoint of the output folder, or from this one")  # fmt: skip
    begin.add_argument("--overwrite", action="store_true", help="replace the run that lies in the output folder")
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # of processes that `graft train` starts
    options = parser.parse_args(arguments)
    if options.parent is not None:
        end_with_parent(options.parent)
    configure_logging()
    return train(options.config, options.set, options.resume, overwrite=options.overwrite)


def train(config_path: Path, overrides: Sequence[str], resume: str | None, *, overwrite: bool = False) -> int:
    """Run this process's part; problems that the user can mend are one sentence.

    What all processes meet is told by one on each host, all else by the process that met it.
    """
    rank, local_rank = 0, 0
    try:
        rank, world_size, local_rank = process_rank()
        config = read_config(config_path, overrides)
        _train(config, resume, rank, world_size, local_rank, overwrite=overwrite)
    except KeyboardInterrupt:
        return 130
    except (GraftError, ValueError, OSError, ReplicasDiffer) as error:
        logger.debug("the run ended", exc_info=True)
        if local_rank == 0 or not isinstance(error, _MET_BY_ALL):
            _tell(rank, str(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        told = describe_failure(error)
        if told is None:
            raise
        logger.debug("the run ended", exc_info=True)
        if local_rank == 0 or not is_lost_connection(error):
            _tell(rank, told)
        return 1
    return 0


def _train(
    config: TrainConfig, resume: str | None, rank: int, world_size: int, local_rank: int, *, overwrite: bool = False
) -> None:
    if rank:
        logging.getLogger("runtime.trainer").setLevel(logging.WARNING)
    shape = mesh_shape(config.parallel)
    check_process_count(shape, world_size)
    device = _device(config)
    _check_devices(device, local_rank)
    device = bind_process(device, local_rank)
    start_processes(device, rank, world_size)
    Training(config, make_mesh(shape, rank), device, resume, overwrite=overwrite).run()
    stop_processes()  # not after an error: taking groups apart while others fail can abort the process


def _device(config: TrainConfig) -> torch.device:
    try:
        return open_device(config.device)
    except ValueError as cause:
        raise ConfigError(str(cause)) from None


def _check_devices(device: torch.device, local_rank: int) -> None:
    """Raises MetByAll, on all processes of the host, where one would find no accelerator of its own."""
    if device.type == "cpu":
        return
    num_processes, num_devices = num_local_processes(local_rank), torch.get_device_module(device).device_count()
    if num_processes > num_devices:
        raise MetByAll(
            f"{num_processes} processes were started on this host, which has {num_devices} of device = "
            f"'{device.type}', and each needs its own: start fewer here and more on other hosts, or lower the sizes of "
            "`parallel`"
        )


def _tell(rank: int, message: str) -> None:
    sys.stderr.write(f"graft train: {message}\n" if not rank else f"graft train (process {rank}): {message}\n")


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of the communication libraries must not hold up or spoil the end
