"""Dropout masks: their share, what they depend on and what not, and the layers that use them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.trainer.config import LoraSettings
from runtime.trainer.dropout import Dropout, make_dropout
from runtime.trainer.stage import TrainingStage
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V3, Shape
from tests.trainer.stages import gradients, make_batch, make_rows, make_stage

NAME = "model.layers.3.self_attn.o_proj"


def mask(dropout: Dropout | None, ids: Tensor, num_columns: int = 512, first_column: int = 0) -> Tensor:
    """True where an input is kept."""
    assert dropout is not None
    return dropout.scaled_mask(ids, num_columns, first_column, torch.float32) > 0


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("first_id", [0, 10**6, 2**45])
def test_the_share_that_is_dropped_is_p_in_all_and_in_every_row_and_column(p: float, first_id: int) -> None:
    """Within five standard deviations of a binomial, which 3,073 counts all keep in 99.8 % of truly random masks."""
    dropped = ~mask(make_dropout(p, 0, NAME), torch.arange(first_id, first_id + 2048), 1024)
    for counts, of in ((dropped.sum(), dropped.numel()), (dropped.sum(0), 2048), (dropped.sum(1), 1024)):
        assert (counts - p * of).abs().max() < 5 * math.sqrt(of * p * (1 - p))


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    dropout = make_dropout(0.2, 0, NAME)
    assert dropout is not None
    assert dropout.scaled_mask(torch.arange(64), 64, 0, torch.float32).unique().tolist() == [0.0, 1.25]
    assert dropout.scaled_mask(torch.arange(64), 64, 0, torch.bfloat16).unique().tolist() == [0.0, 1.25]


def test_no_probability_means_no_dropout() -> None:
    assert make_dropout(0.0, 0, NAME) is None


def test_masks_follow_from_rows_and_columns_whoever_asks_for_them() -> None:
    """Any order and choice of rows, and any part of the columns, is cut out of the same mask."""
    dropout, ids = make_dropout(0.5, 3, NAME), torch.arange(1000, 1256)
    whole = mask(dropout, ids)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(mask(dropout, ids[order]), whole[order])
    assert torch.equal(mask(dropout, ids, 128, 384), whole[:, 384:])
    assert torch.equal(mask(dropout, ids, 1, 7), whole[:, 7:8])


def correlation(one: Tensor, other: Tensor) -> float:
    """Of two masks, in standard deviations of what independent ones show."""
    signs = (one.double() - one.double().mean()) * (other.double() - other.double().mean())
    return abs(float(signs.sum() / signs.square().sum().sqrt()))


def test_masks_of_other_modules_seeds_rows_and_columns_are_unrelated() -> None:
    ids = torch.arange(512)
    modules = [f"model.layers.{layer}.mlp.{leaf}" for layer in range(3) for leaf in ("gate_proj", "up_proj")]
    masks = [mask(make_dropout(0.5, seed, module), ids) for module in modules for seed in (0, 1)]
    first = make_dropout(0.5, 0, modules[0])
    assert first is not None
    masks.append(mask(Dropout(0.5, ~first.key), ids))  # that of the experts' second projection
    masks += [mask(first, ids + shift) for shift in (1, 512, 2**32)] + [mask(first, ids, first_column=1)]
    masks += [masks[0].T, masks[0].flip(0), masks[0].flip(1)]
    worst = max(correlation(one, other) for one, other in itertools.combinations(masks, 2))
    assert worst < 5


def test_neighbouring_bits_of_a_mask_are_unrelated() -> None:
    found = mask(make_dropout(0.5, 0, NAME), torch.arange(1024))
    for row_shift, column_shift in itertools.product(range(5), range(5)):
        if row_shift or column_shift:
            moved = found[row_shift:, column_shift:]
            assert correlation(moved, found[: len(moved), : moved.shape[1]]) < 5
    eigenvalues = torch.linalg.svdvals(found.double() * 2 - 1)[:1]
    assert float(eigenvalues) < 1.1 * (1024**0.5 + 512**0.5)  # the edge that random signs have


KINDS = ("q_a_proj", "kv_b_proj", "o_proj", "shared_experts", "experts", "layers.0.mlp", "lm_head")


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_alone_on_every_kind_of_module(oracle: Callable[[Shape], Oracle], kind: str) -> None:
    batch = make_batch(make_rows(((20, 12),)))
    dropping, plain = (make_stage(oracle(V3), LoraSettings((kind,), rank=4, dropout=p)) for p in (0.5, 0.0))

    def losses(stage: TrainingStage) -> Tensor:
        with torch.no_grad():
            return stage.losses(stage.hidden(None, batch), batch).losses_N

    assert not torch.allclose(losses(dropping), losses(plain), atol=1e-3)
    assert torch.equal(losses(dropping.eval()), losses(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_two_micro_batches_of_one_row_drop_what_one_of_two_rows_drops(
    oracle: Callable[[Shape], Oracle], kind: str
) -> None:
    rows = make_rows(((20, 9), (13,)), seed=1)
    stage = make_stage(oracle(V3), LoraSettings((kind,), rank=4, dropout=0.5))
    together = gradients(stage, [make_batch(rows)])
    apart = gradients(stage, [make_batch([row], of=rows, first_row=index) for index, row in enumerate(rows)])
    assert apart[0] == pytest.approx(together[0], rel=1e-6)
    for name, gradient in together[1].items():
        torch.testing.assert_close(apart[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_another_place_in_the_run_drops_something_else(oracle: Callable[[Shape], Oracle]) -> None:
    rows = make_rows(((20, 9),), seed=1)
    stage = make_stage(oracle(V3), LoraSettings(("o_proj",), rank=4, dropout=0.5))
    losses = {gradients(stage, [make_batch(rows, first_row=row)])[0] for row in range(3)}
    assert len(losses) == 3
