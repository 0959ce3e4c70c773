"""A process that is gone is told from all else that torch.distributed can complain of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from runtime.distributed.mesh import is_lost_connection

Groups = dict[int, dist.ProcessGroupGloo]


@pytest.fixture
def groups() -> Groups:
    """Two processes' ends of one Gloo group, both in this process."""
    store, made = dist.HashStore(), {}

    def join(rank: int) -> None:
        made[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=1))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def error_of(work: Callable[[], object]) -> RuntimeError:
    with pytest.raises(RuntimeError) as raised:
        work()
    return raised.value


def test_a_process_that_left_is_a_lost_connection(groups: Groups) -> None:
    del groups[1]
    assert is_lost_connection(error_of(lambda: groups[0].allreduce([torch.zeros(3)]).wait()))


def test_a_process_that_says_nothing_for_too_long_is_a_lost_connection(groups: Groups) -> None:
    error = error_of(lambda: groups[0].recv([torch.zeros(3)], 1, 0).wait())
    assert "imed out waiting" in str(error) and is_lost_connection(error)
    assert is_lost_connection(error_of(lambda: groups[0].recv([torch.zeros(3)], 1, 0).wait())), "and the next call"


def test_a_meeting_place_that_is_not_there_is_a_lost_connection() -> None:
    error = error_of(lambda: dist.TCPStore("127.0.0.1", 1, 2, False, timeout=timedelta(milliseconds=50)))
    assert is_lost_connection(error)


def test_gloo_refusing_its_arguments_is_none(groups: Groups) -> None:
    error = error_of(lambda: groups[0].allreduce([torch.zeros(3), torch.zeros(4)]).wait())
    assert "Gloo" in str(error) and not is_lost_connection(error)


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.27.3\n"
         "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting early.", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage, NCCL version 2.27.3\n"
         "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
         "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 3000", False),
        ("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'", False),
    ],
)  # fmt: skip
def test_of_nccls_errors_only_those_of_other_processes_are(message: str, is_lost: bool) -> None:
    assert is_lost_connection(dist.DistBackendError(message)) is is_lost


def test_what_a_pipeline_raises_because_of_one_is_one() -> None:
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("[Stage 0] failed to run forward") from RuntimeError("Connection closed by peer [::1]:5")
    assert is_lost_connection(raised.value)


def test_words_of_other_errors_are_none() -> None:
    for error in (RuntimeError("no kernel for gloo tensors"), OSError("Broken pipe"), ValueError("connection closed")):
        assert not is_lost_connection(error)
