"""Large parts of a computation side by side on the CPU, each thread computing on one core.

Products of some dozen rows gain little from being split over cores, and those of LoRA's rank nothing; whole shares of
them, with all that happens between, gain in proportion. PyTorch offers no way to say how many cores one thread's
operations take, so the OpenMP runtime that it brings along, and MKL, are asked directly; where they are not found,
shares are computed one after the other.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

START_SECONDS = 60.0


def num_threads() -> int:
    """How many shares can be computed at the same time."""
    return torch.get_num_threads() if _thread_count_setters() else 1


def side_by_side(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all tasks, in order; one alone runs where it is."""
    if len(tasks) == 1 or num_threads() == 1:
        return [task() for task in tasks]
    pool = _pool(os.getpid(), num_threads())
    return [done.result() for done in [pool.submit(_without_gradients, task) for task in tasks]]


def in_each_thread(run: Callable[[int], object]) -> None:
    """Call `run` in each thread that computes shares, with 0, 1 and so on; those that are not there are started."""
    count = num_threads()
    if count == 1:
        return
    all_there = threading.Barrier(count, timeout=START_SECONDS)

    def task(number: int) -> None:
        all_there.wait()
        run(number)

    for done in [_pool(os.getpid(), count).submit(task, number) for number in range(count)]:
        done.result()


def equal_shares(counts: Sequence[int], num_shares: int) -> list[tuple[slice, slice]]:
    """(groups, rows) of consecutive groups with about equal rows; no share is without rows, unless all are."""
    total = sum(counts)
    shares: list[tuple[slice, slice]] = []
    group = row = 0
    for index, count in enumerate(counts, 1):
        end = shares[-1][1].stop if shares else 0
        row += count
        is_full = row > end and row * num_shares >= total * (len(shares) + 1) and row < total
        if is_full or index == len(counts):
            shares.append((slice(group, index), slice(end, row)))
            group = index
    return shares


def _without_gradients(task: Callable[[], T]) -> T:
    """Threads begin with gradients on, whatever their caller does."""
    with torch.no_grad():
        return task()


@lru_cache(maxsize=4)
def _pool(process: int, size: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each; a forked process makes its own."""
    return ThreadPoolExecutor(size, "share", initializer=compute_on_one_core)


def compute_on_one_core() -> None:
    """From now on the calling thread's operations take one core; for the beginning of a thread."""
    torch.get_num_threads()  # PyTorch sets a thread's number at its first use, and would undo what comes now
    for set_num_threads in _thread_count_setters():
        set_num_threads(1)


@lru_cache(maxsize=1)
def openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that PyTorch brings along, if it is GNU's."""
    return _library("libgomp*.so*")


@lru_cache(maxsize=1)
def _thread_count_setters() -> tuple[Callable[[int], object], ...]:
    """Functions that set how many cores the calling thread's operations take: OpenMP's, and MKL's if it is there."""
    if openmp() is None:
        return ()
    named = ((openmp(), "omp_set_num_threads"), (_library("libtorch_cpu.so"), "MKL_Set_Num_Threads_Local"))
    return tuple(getattr(library, name) for library, name in named if library and hasattr(library, name))


def _library(pattern: str) -> ctypes.CDLL | None:
    """One of PyTorch's own."""
    paths = sorted((Path(torch.__file__).parent / "lib").glob(pattern))
    return ctypes.CDLL(str(paths[0])) if paths else None
