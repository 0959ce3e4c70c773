"""Shares of a grouped computation: equal, complete, in threads that take one core and record no gradients."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.ops import cpu_threads


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 5))
def test_shares_cover_all_groups_and_rows_in_order(counts: list[int], num_shares: int) -> None:
    shares = cpu_threads.equal_shares(counts, num_shares)
    assert 1 <= len(shares) <= num_shares
    groups = [group for share, _ in shares for group in range(share.start, share.stop)]
    assert groups == list(range(len(counts)))
    for share, rows in shares:
        assert rows.start == sum(counts[: share.start]) and rows.stop == sum(counts[: share.stop])
        assert rows.stop > rows.start or not any(counts)
        assert rows.stop - rows.start <= sum(counts) / num_shares + 2 * max(counts)


def test_tasks_run_in_other_threads_on_one_core_each_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_threads._thread_count_setters():
        pytest.skip("this PyTorch brings no OpenMP runtime that can be asked")
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu_threads, "num_threads", lambda: 2)

    def task(index: int) -> tuple[int, str, int, bool]:
        torch.randn(300, 300) @ torch.randn(300, 300)
        return index, threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()

    found = cpu_threads.side_by_side([lambda index=index: task(index) for index in range(6)])  # type: ignore[misc]
    assert [index for index, *_ in found] == list(range(6))
    for _, name, cores, gradients in found:
        assert name != threading.current_thread().name
        assert (cores, gradients) == (1, False)
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


def test_an_error_in_a_share_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "num_threads", lambda: 2)

    def fail() -> int:
        raise ValueError("a share")

    with pytest.raises(ValueError, match="a share"):
        cpu_threads.side_by_side([lambda: 1, fail])
