"""What goes wrong in a test's run, on purpose: the sending switched off, a factor changed, a disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from runtime.trainer.loop import Training

FAULTY_STEP = 2
LAST = "on the last process"
NO_BROADCAST, CHANGED_LINEAR, CHANGED_EXPERT = "no broadcast", f"changed linear {LAST}", f"changed expert {LAST}"
UNSHARED = f"an output of its own {LAST}"
DISK_FULL, DISK_FULL_ON_ONE = "disk full", f"disk full {LAST}"
FILE_BYTES = 2048  # less than a checkpoint's files


@contextmanager
def fault_at_start(fault: str | None) -> Iterator[None]:
    """While the factors are drawn and sent."""
    if fault != NO_BROADCAST:
        yield
        return
    with mock.patch("runtime.trainer.initialise.send_to_all"):
        yield


@contextmanager
def fault_after_step(fault: str | None, training: Training) -> Iterator[None]:
    """Around what follows a step; a factor is changed after the step's own check of the replicas."""
    world = training.mesh.world
    is_here = fault is not None and training.step == FAULTY_STEP and (LAST not in fault or world.rank == world.size - 1)
    if not is_here:
        yield
    elif fault in (DISK_FULL, DISK_FULL_ON_ONE):
        with _full_disk():
            yield
    else:
        yield
        _change_factor(training, of_expert=fault == CHANGED_EXPERT)


@contextmanager
def _full_disk() -> Iterator[None]:
    """No file may grow beyond a size; the system then refuses the write, as it does when there is no room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _change_factor(training: Training, *, of_expert: bool) -> None:
    """One number a little; the last bit alone might be rounded away by the next optimizer step."""
    own = [parameter for parameter in training.model.parameters if (parameter.experts is not None) == of_expert]
    own[0].tensor.data.view(-1)[3] += 1e-4
