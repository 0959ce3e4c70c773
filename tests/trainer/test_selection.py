"""Which experts a task uses: the fewest that reach a share, counted as transformers' router routes the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.trainer.config import DataConfig, SelectionConfig, TrainConfig
from runtime.trainer.data.documents import Document
from runtime.trainer.data.rows import RowStream
from runtime.trainer.selection import fewest_reaching, select_experts
from tests.oracle.base_models import Oracle, logits
from tests.oracle.shapes import V2_GROUPED, V2_LITE, V3, Shape
from tests.trainer.stages import make_rows, make_stage

SHAPES = pytest.mark.parametrize("shape", (V3, V2_LITE, V2_GROUPED), ids=lambda shape: shape.name)
DOCUMENTS = [row[0] for row in make_rows(((23,), (9,), (30,), (1,), (14,), (17,), (5,)), seed=6, num_words=12)]


def fewest_by_trying(scores: list[int], threshold: float) -> int:
    """The least number of experts of which some set reaches the threshold."""
    total, reached = sum(scores), 0.0
    for count, score in enumerate(sorted(scores, reverse=True), 1):
        reached += score
        if reached >= threshold * total - 1e-9:
            return count
    raise AssertionError("all of them reach any threshold")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any), st.integers(1, 100))
def test_no_fewer_experts_reach_the_threshold(scores: list[int], percent: int) -> None:
    chosen = fewest_reaching(torch.tensor(scores, dtype=torch.float64), percent / 100)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == fewest_by_trying(scores, percent / 100)
    assert sum(scores[expert] for expert in chosen) >= percent / 100 * sum(scores) - 1e-9
    left = [score for expert, score in enumerate(scores) if expert not in chosen]
    assert max(left, default=0) <= min(scores[expert] for expert in chosen)


def test_at_equal_scores_the_lower_index_goes_in() -> None:
    assert fewest_reaching(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]).double(), 0.7) == (0, 1, 3)
    assert fewest_reaching(torch.ones(10).double(), 0.3) == (0, 1, 2)
    assert fewest_reaching(torch.ones(10).double(), 1.0) == tuple(range(10))


def make_config(micro_batch_rows: int = 1) -> TrainConfig:
    data = DataConfig((Path("unused"),), max_length=32, shuffle=True)
    return TrainConfig(Path("unused"), Path("unused"), data, steps=1, micro_batch_rows=micro_batch_rows, seed=4)


def scores_by_transformers(base: Oracle, documents: Sequence[Document], by: str) -> dict[int, Tensor]:
    """Layer -> score of each expert, from what enters its experts: their indices and weights."""
    shape = base.shape.config
    scores = {layer: torch.zeros(shape["n_routed_experts"], dtype=torch.float64) for layer in (1, 2)}

    def count(layer: int, indices: Tensor, weights: Tensor) -> None:
        worth = weights.double() / weights.double().sum(-1, keepdim=True)
        if by == "token_share":
            worth = torch.ones_like(worth)
        scores[layer].index_add_(0, indices.flatten(), worth.flatten())

    hooks = [
        base.model.get_submodule(f"model.layers.{layer}.mlp.experts").register_forward_pre_hook(
            lambda module, args, layer=layer: count(layer, args[1], args[2])
        )
        for layer in scores
    ]
    for document in documents:
        logits(base.model, document.token_ids.tolist())
    for hook in hooks:
        hook.remove()
    return scores


@pytest.mark.parametrize("by", ["gate_score", "token_share"])
@SHAPES
def test_the_experts_of_a_task_are_those_of_transformers_router(
    oracle: Callable[[Shape], Oracle], shape: Shape, by: str
) -> None:
    base, stage = oracle(shape), make_stage(oracle(shape))
    for parameter in stage.lora_parameters():
        parameter.tensor.data.zero_()
    scores = scores_by_transformers(base, DOCUMENTS, by)
    for threshold in (0.1, 0.5, 0.9):
        chosen = select_experts(make_config(), SelectionConfig(by, threshold), DOCUMENTS, stage)
        assert chosen == {layer: fewest_reaching(score, threshold) for layer, score in scores.items()}
        assert 0 < len(chosen[1]) < shape.config["n_routed_experts"]
    assert stage.training
    assert [moe.observe_routing for moe in stage.moe_layers().values()] == [None, None]


@pytest.mark.parametrize("sample_rows", [1, 4, 100])
def test_every_row_of_the_sample_counts_once_whatever_the_size_of_micro_batches(
    oracle: Callable[[Shape], Oracle], sample_rows: int
) -> None:
    """The last micro-batch may be a part of one, and a small data set less than one."""
    stage = make_stage(oracle(V3))
    for parameter in stage.lora_parameters():
        parameter.tensor.data.zero_()
    config = make_config()
    stream = RowStream(DOCUMENTS, replace(config.data, pack=False), config.seed)
    sample = [stream.row(index)[0] for index in range(min(sample_rows, len(DOCUMENTS)))]
    scores = scores_by_transformers(oracle(V3), sample, "token_share")
    expected = {layer: fewest_reaching(score, 0.6) for layer, score in scores.items()}
    for micro_batch_rows in (1, 2, 3, 16):
        selection = SelectionConfig("token_share", 0.6, sample_rows)
        assert select_experts(make_config(micro_batch_rows), selection, DOCUMENTS, stage) == expected
