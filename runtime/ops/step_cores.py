"""Steps that compute on all cores of the host: each of their threads keeps one core.

Adapters are read by a process that has what cores are left. Beside it Linux at times runs two threads of a step on one
core, as if the other were taken, and such a step takes up to twice as long.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from runtime.env import places_openmp_threads
from runtime.ops.cpu_threads import in_each_thread, openmp

logger = logging.getLogger(__name__)


class StepCores:
    """Use it in `with` around a step's computation, in the thread that made it; of no cores, it does nothing."""

    def __init__(self, cores: Sequence[int] = (), workers: Sequence[int] = ()) -> None:
        """`workers` are the system's numbers of OpenMP's threads, which keep all of the cores but the first."""
        self._cores = tuple(cores)
        self._workers = tuple(workers)

    def __enter__(self) -> None:
        """The calling thread keeps its core only for as long as it computes, since what it starts inherits it.

        So do workers that OpenMP starts in place of others that it has ended; then no thread keeps a core any more.
        """
        try:
            for worker in self._workers:
                os.sched_getaffinity(worker)
            if self._cores:
                os.sched_setaffinity(0, self._cores[:1])
        except OSError as error:  # a worker has ended, or the process was given other cores
            logger.warning("threads of steps keep no cores any more: %s", error)
            _place([self._cores])
            self._cores = self._workers = ()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._cores:
            _run_on(self._cores)


def keep_cores() -> StepCores:
    """From now on the threads that compute for the calling one keep a core each, and it keeps the first one in steps.

    Nothing is done where there is not one thread for each core, or the environment says where they run.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if openmp() is None or len(cores) < 2 or torch.get_num_threads() != len(cores) or places_openmp_threads():
        return StepCores()
    workers, errors = _place([[core] for core in cores])
    if errors:
        logger.warning("threads of steps keep no cores: %s", errors[0])
        _place([cores])
        return StepCores()
    _run_on(cores)
    return StepCores(cores, workers)


def _place(choices: Sequence[Sequence[int]]) -> tuple[list[int], list[OSError]]:
    """Let the n-th thread of OpenMP, of which the calling one is the first, and of shares run on the n-th choice.

    After the last choice comes the first. Returns the system's numbers of OpenMP's other threads, and what failed.
    """
    workers: list[int] = []
    errors: list[OSError] = []

    def place(number: int) -> None:
        error = _run_on(choices[number % len(choices)])
        if error is not None:
            errors.append(error)

    def place_openmp(number: int) -> None:
        place(number)
        if number:
            workers.append(threading.get_native_id())

    _in_each_openmp_thread(place_openmp)
    in_each_thread(place)
    return workers, errors


def _in_each_openmp_thread(run: Callable[[int], None]) -> None:
    """Call `run` with 0 in the calling thread, and with 1 and so on in those that OpenMP has for it."""
    library = openmp()
    if library is None:
        return

    def call(_: int | None) -> None:
        run(library.omp_get_thread_num())

    library.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(call), None, torch.get_num_threads(), 0)


def _run_on(cores: Sequence[int]) -> OSError | None:
    """Let the calling thread run on these cores; returns why it cannot."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        return error
    return None
