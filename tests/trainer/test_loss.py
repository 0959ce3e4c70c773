"""The loss of target tokens: in chunks as in one piece, against PyTorch's own, and with nothing to learn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import runtime.trainer.loss
from runtime.distributed.mesh import Group
from runtime.trainer.config import LoraSettings
from runtime.trainer.data.batch import IGNORED
from runtime.trainer.lora import LoraParallelLinear
from runtime.trainer.loss import _chunk_losses
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V3, Shape
from tests.trainer.stages import gradients, make_batch, make_rows, make_stage

ROWS = make_rows(((14, 9), (21,)), seed=4)
# Also with dropout in the head, whose chunks are computed twice.
LORA = LoraSettings(("lm_head", "o_proj"), rank=4, dropout=0.2)


def test_losses_are_those_of_pytorch_at_the_targets_alone(oracle: Callable[[Shape], Oracle]) -> None:
    stage, batch = make_stage(oracle(V3)), make_batch(ROWS)
    with torch.no_grad():
        hidden = stage.hidden(None, batch)
        found, logits = stage.losses(hidden, batch), stage.logits(hidden, batch)
    is_target = batch.targets_T != IGNORED
    assert torch.equal(found.rows_N, is_target.nonzero()[:, 0])
    expected = cross_entropy(logits[is_target], batch.targets_T[is_target], reduction="none")
    torch.testing.assert_close(found.losses_N, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.is_best_N, logits[is_target].argmax(-1) == batch.targets_T[is_target])


class _Logits:
    """A head that gives these logits, in place of `LoraParallelLinear`."""

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV, self.local_out = logits_NV, logits_NV.shape[1]

    def __call__(self, hidden_NH: Tensor, ids_N: Tensor) -> Tensor:
        return self.logits_NV


TIED = torch.tensor([[1.0, 5.0, 5.0, 5.0], [3.0, 0.0, 0.0, 3.0], [0.0, 1.0, 2.0, 2.0]], dtype=torch.bfloat16)
PICKED = [1, 0, 2]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_of_equal_logits_the_lowest_token_counts_as_picked_as_in_the_server(
    monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    """Processes are threads here; what they exchange is gathered in a list."""
    barrier, parts = threading.Barrier(tp_size), [torch.empty(0)] * tp_size

    def exchange(x: Tensor, tp: Group) -> Tensor:
        barrier.wait(10)
        parts[tp.rank] = x.detach()
        barrier.wait(10)
        return torch.stack(parts)

    monkeypatch.setattr(runtime.trainer.loss, "max_over", lambda x, tp: exchange(x, tp).amax(0))
    monkeypatch.setattr(runtime.trainer.loss, "leave_parallel", lambda x, tp: exchange(x, tp).sum(0))

    def picked(rank: int) -> list[list[bool]]:
        tp = Group(tuple(range(tp_size)), rank, None)
        head = cast(LoraParallelLinear, _Logits(TIED.chunk(tp_size, 1)[rank]))
        nothing = torch.zeros(len(TIED), dtype=torch.int64)
        return [
            _chunk_losses(nothing, torch.full_like(nothing, token), nothing, head, tp)[1].tolist() for token in range(4)
        ]

    with ThreadPoolExecutor(tp_size) as threads:
        found = list(threads.map(picked, range(tp_size)))
    assert TIED.float().argmax(-1).tolist() == PICKED, "what the server's sampler takes"
    expected = [[token == best for best in PICKED] for token in range(4)]
    assert found == [expected] * tp_size


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_neither_loss_nor_gradients(
    oracle: Callable[[Shape], Oracle], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    stage, batch = make_stage(oracle(V3), LORA), make_batch(ROWS)
    whole = gradients(stage, [batch])
    monkeypatch.setattr(runtime.trainer.loss, "MAX_LOGITS", chunk * stage.config.vocab_size + 1)
    chunked = gradients(stage, [batch])
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(chunked[1][name], gradient, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        found = stage.losses(stage.hidden(None, batch), batch)
    assert len(found.losses_N) == len(found.is_best_N) == len(found.rows_N) > 1


@pytest.mark.parametrize("max_logits", [2**25, 1])
def test_a_micro_batch_without_targets_has_no_loss_and_gradients_of_zero(
    oracle: Callable[[Shape], Oracle], monkeypatch: pytest.MonkeyPatch, max_logits: int
) -> None:
    monkeypatch.setattr(runtime.trainer.loss, "MAX_LOGITS", max_logits)
    stage = make_stage(oracle(V3))
    batch = make_batch(ROWS)
    batch.targets_T.fill_(IGNORED)
    loss, found = gradients(stage, [batch])
    assert loss == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in found.values())


def test_a_row_without_targets_adds_nothing_to_that_of_the_others(oracle: Callable[[Shape], Oracle]) -> None:
    stage = make_stage(oracle(V3))
    alone = gradients(stage, [make_batch(ROWS[:1])])
    both = make_batch(ROWS)
    both.targets_T[both.width :] = IGNORED
    beside = gradients(stage, [both])
    ratio = make_batch(ROWS[:1]).loss_weight / both.loss_weight
    assert beside[0] * ratio == pytest.approx(alone[0], rel=1e-6)
    for name, gradient in alone[1].items():
        torch.testing.assert_close(beside[1][name] * ratio, gradient, atol=1e-6, rtol=1e-4)
