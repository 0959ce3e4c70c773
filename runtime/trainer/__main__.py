"""One process of a training run: `torchrun --nproc-per-node N -m runtime.trainer CONFIG.yaml`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.distributed.mesh import make_mesh, start_processes, stop_processes
from runtime.env import configure_logging, process_rank
from runtime.errors import GraftError
from runtime.ops.platform import bind_process, open_device
from runtime.trainer.config_file import read_config
from runtime.trainer.loop import Training
from runtime.trainer.mesh_shape import mesh_shape
from runtime.trainer.replicas import ReplicasDiffer

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the run is done, 1 after a sentence that says what to change."""
    parser = argparse.ArgumentParser(prog="python -m runtime.trainer", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="CHECKPOINT",
                        help="go on from the newest checkpoint of the output folder, or from this one")  # fmt: skip
    options = parser.parse_args(arguments)
    configure_logging()
    return train(options.config, options.set, options.resume)


def train(config_path: Path, overrides: Sequence[str], resume: str | None) -> int:
    """Run this process's part; problems that the user can mend are one sentence, told by process 0."""
    rank, world_size, local_rank = process_rank()
    if rank:
        logging.getLogger("runtime.trainer").setLevel(logging.WARNING)
    try:
        config = read_config(config_path, overrides)
        device = bind_process(open_device(config.device), local_rank)
        start_processes(device, rank, world_size)
        mesh = make_mesh(mesh_shape(config.parallel), rank)
        Training(config, mesh, device, resume).run()
    except (GraftError, ValueError, OSError, ReplicasDiffer) as error:
        logger.debug("the run ended", exc_info=True)
        if local_rank == 0 or not isinstance(error, ValueError | ReplicasDiffer):  # those are met by all alike
            sys.stderr.write(f"graft train: {error}\n" if not rank else f"graft train (process {rank}): {error}\n")
        return 1
    finally:
        stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
