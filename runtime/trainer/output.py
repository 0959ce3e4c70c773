"""The output folder of a run: whether it can be written, is seen by all, and one run at a time writes there."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import uuid
from pathlib import Path

from runtime.distributed.mesh import Group, MetByAll, gather_objects, together
from runtime.trainer.config import ADAPTER, BEST_ADAPTER, CHECKPOINTS, CURVE
from runtime.trainer.config_file import ConfigError
from runtime.trainer.export.adapter_files import check_adapter_folder

LOCK = ".lock"

logger = logging.getLogger(__name__)


def check_output(output: Path) -> None:
    """Make the folder; raises ConfigError if files cannot be written there, or an adapter would replace other files."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"\0")
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise ConfigError(f"output = {str(output)!r}: cannot be written ({reason}): choose another output") from None
    try:
        for name in (ADAPTER, BEST_ADAPTER):
            check_adapter_folder(output / name)
    except ValueError as cause:
        raise ConfigError(f"output = {str(output)!r}: the run could not leave its adapter there: {cause}") from None


def adapters_in(output: Path) -> list[str]:
    """Names of the adapter folders that a run has left in its output."""
    return [name for name in (ADAPTER, BEST_ADAPTER) if (output / name).is_dir() and any((output / name).iterdir())]


def remove_earlier_run(output: Path) -> None:
    """Remove the adapters, checkpoints and curve of an earlier run; its log stays, the new one is written beside it."""
    for name in (ADAPTER, BEST_ADAPTER, CHECKPOINTS):
        if (output / name).is_dir():
            logger.info("%s of an earlier run is removed", output / name)
            shutil.rmtree(output / name)
    (output / CURVE).unlink(missing_ok=True)


def check_shared(output: Path, world: Group) -> None:
    """Raises MetByAll naming the processes that do not see what process 0 writes; every process calls this."""
    token = output / str(gather_objects(f".shared-{uuid.uuid4().hex}", world)[0])  # never looked for before
    together(lambda: token.touch() if world.rank == 0 else None, world)
    try:
        sees = gather_objects(token.exists(), world)
    finally:
        if world.rank == 0:
            token.unlink(missing_ok=True)
    blind = [str(rank) for rank, is_seen in zip(world.ranks, sees, strict=True) if not is_seen]
    if blind:
        raise MetByAll(
            f"output = {str(output)!r}: process {', '.join(blind)} cannot see what process 0 writes there: choose a "
            "folder that all hosts of the run share, by the same path"
        )


class OutputLock:
    """Held by one process while a run writes into a folder. The system lets go of it when that process is killed."""

    def __init__(self, output: Path) -> None:
        """Take it; raises ConfigError naming the process that has it."""
        self._file = (output / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(200).strip() or "a process that did not say its name"
            self._file.close()
            raise ConfigError(
                f"output = {str(output)!r}: another run writes there ({holder}): wait for its end, or choose another "
                "output"
            ) from None
        except OSError as cause:
            logger.warning("%s cannot be locked (%s): start no second run with this output", output, cause.strerror)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let another run have the folder. The file stays: removing it could take it from a run that holds it."""
        self._file.close()
