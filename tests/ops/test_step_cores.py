"""Threads of steps keep a core each where there is one for each of them, and nothing that they start does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from runtime.env import child_environment
from runtime.ops import cpu_threads, step_cores
from runtime.ops.step_cores import StepCores, keep_cores

NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
PROGRAM = """
import json, os, sys, threading
import torch
from runtime.ops import cpu_threads
from runtime.ops.step_cores import keep_cores

def cores_of(task=0):
    return sorted(os.sched_getaffinity(task))

def in_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(cores_of()))
    thread.start()
    thread.join()
    return found

if sys.argv[1]:
    torch.set_num_threads(int(sys.argv[1]))
product = torch.randn(500, 500) @ torch.randn(500, 500)
cores = keep_cores()
with cores:
    within = cores_of()
    product @ product
    shares = cpu_threads.side_by_side([cores_of] * 50)
others = [cores_of(int(task)) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
print(json.dumps([within, cores_of(), in_new_thread(), shares, others]))
"""

needs_two_cores = pytest.mark.skipif(
    NUM_CORES < 2 or cpu_threads.openmp() is None, reason="one core, or a PyTorch without GNU's OpenMP"
)


def _run(num_threads: str = "", **environment: str) -> list[list[int]]:
    variables = child_environment() | environment
    if not environment:
        variables = {name: value for name, value in variables.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", PROGRAM, num_threads or str(NUM_CORES)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=True)
    found: list[list[int]] = json.loads(done.stdout)
    return found


@needs_two_cores
def test_each_thread_of_a_step_keeps_a_core_and_a_thread_that_is_started_later_has_all() -> None:
    every = sorted(os.sched_getaffinity(0))
    within, after, of_new, of_shares, of_others = _run()
    assert within == every[:1] and after == every and of_new == every
    assert {tuple(cores) for cores in of_shares} <= {(core,) for core in every}
    # OpenMP's workers have all cores but the first, the threads of shares all.
    kept = sorted(cores[0] for cores in of_others if len(cores) == 1)
    assert kept == sorted([*every[1:], *every])


@needs_two_cores
@pytest.mark.parametrize(("num_threads", "environment"), [("1", {}), ("", {"OMP_PROC_BIND": "false"})])
def test_nothing_is_kept_by_fewer_threads_than_cores_or_where_the_user_has_a_say(
    num_threads: str, environment: dict[str, str]
) -> None:
    every = sorted(os.sched_getaffinity(0))
    within, after, of_new, _, of_others = _run(num_threads, **environment)
    assert within == after == of_new == every
    assert all(cores == every for cores in of_others)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What threads of this process ask for, and do not get."""
    cores: list[tuple[int, ...]] = []
    monkeypatch.setattr("os.sched_setaffinity", lambda task, own: cores.append(tuple(own)), raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda task: {3, 8}, raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    return cores


def _refuse(task: int, cores: object) -> None:
    raise OSError(22, "Invalid argument")


def test_a_system_that_refuses_to_place_threads_is_told_of_and_serves(
    asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_cores, "openmp", lambda: _OneThread())
    monkeypatch.setattr("os.sched_setaffinity", _refuse)
    with keep_cores():
        pass
    assert not asked and "threads of steps keep no cores: [Errno 22]" in caplog.text


def test_without_gnus_openmp_the_calling_thread_keeps_no_core_either(
    asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cores, "openmp", lambda: None)
    with keep_cores():
        pass
    assert not asked


def test_cores_that_were_taken_away_are_kept_no_more_and_the_step_is_computed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.sched_setaffinity", _refuse, raising=False)
    cores, num_steps = StepCores([0, 1]), 0
    for _ in range(2):
        with cores:
            num_steps += 1
    assert num_steps == 2
    assert caplog.text.count("threads of steps keep no cores any more") == 1


def test_a_worker_that_has_ended_frees_all_threads_from_their_cores(
    asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_such_thread(task: int) -> set[int]:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(step_cores, "openmp", lambda: _OneThread())
    monkeypatch.setattr("os.sched_getaffinity", no_such_thread)
    cores = StepCores([3, 8], [12345])
    with cores:
        pass
    assert set(asked) == {(3, 8)}
    assert "threads of steps keep no cores any more: [Errno 3]" in caplog.text
    asked.clear()
    with cores:
        pass
    assert not asked


def test_an_error_in_a_step_gives_the_cores_back(asked: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="a step"), StepCores([4, 7]):
        raise ValueError("a step")
    assert asked == [(4,), (4, 7)]


class _OneThread:
    """An OpenMP runtime with no worker."""

    def omp_get_thread_num(self) -> int:
        return 0

    def GOMP_parallel(self, call: Callable[[None], None], *_: object) -> None:
        call(None)
