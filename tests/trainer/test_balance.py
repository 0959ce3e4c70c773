"""Balance loss and capacity against counting in plain Python, for all routers, and autograd through transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.router import Router
from runtime.ops.base import make_ops
from runtime.trainer.balance import balance_loss, limit_load
from runtime.trainer.config import LoraSettings, RoutingConfig
from runtime.trainer.micro_batch import MicroBatch
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import MOONLIGHT, V2_GROUPED, V2_LITE, V3, Shape
from tests.trainer.stages import CPU, gradients, make_batch, make_rows, make_stage
from tests.trainer.test_gradients import documents_loss, worst_by_kind

SHAPES = pytest.mark.parametrize("shape", (V3, V2_LITE, V2_GROUPED, MOONLIGHT), ids=lambda shape: shape.name)
LENGTHS = ((9, 12), (5,), (30,), (1, 7))


def make_router(base: Oracle, scores_seed: int, num_tokens: int) -> tuple[Router, Tensor]:
    """A router of the base's kind and the scores [T, E] that it gives to random tokens, uneven on purpose."""
    config = DeepseekConfig.from_dir(base.path)
    router = Router(config, Placement(CPU, torch.float32, make_ops(CPU)))
    generator = torch.Generator().manual_seed(scores_seed)
    router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.2)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.copy_(torch.randn(len(router.weight), generator=generator) * 0.1)
    mean = torch.randn(config.hidden_size, generator=generator)
    return router, router.scores(torch.randn(num_tokens, config.hidden_size, generator=generator) + mean)


def tokens_of_rows(batch: MicroBatch) -> list[range]:
    """For each row the places of its tokens, padding left out."""
    return [range(b * batch.width, b * batch.width + sum(row)) for b, row in enumerate(batch.lengths)]


@SHAPES
def test_balance_loss_is_choice_share_times_mean_score_counted_row_by_row(
    oracle: Callable[[Shape], Oracle], shape: Shape
) -> None:
    batch = make_batch(make_rows(LENGTHS))
    router, scores = make_router(oracle(shape), 0, len(batch.token_ids_T))
    experts = router.choose(scores)
    num_experts, num_choices = scores.shape[1], experts.shape[1]
    expected = 0.0
    for tokens in tokens_of_rows(batch):
        for expert in range(num_experts):
            chosen = sum(expert in experts[t].tolist() for t in tokens)
            share = chosen * num_experts / (num_choices * len(tokens))
            mean = sum(float(scores[t, expert]) / sum(scores[t].tolist()) for t in tokens) / len(tokens)
            expected += share * mean / len(LENGTHS)
    assert expected > 1.05
    assert float(balance_loss(scores, experts, batch)) == pytest.approx(expected, rel=1e-5)


def test_balance_loss_is_one_when_every_expert_gets_the_same() -> None:
    batch = make_batch(make_rows(((8,), (5,))))
    scores = torch.full((16, 8), 0.3)
    experts = torch.stack([torch.arange(16) % 4 * 2, torch.arange(16) % 4 * 2 + 1], dim=1)
    batch.is_real_T[12:] = False
    assert float(balance_loss(scores, experts, batch)) == pytest.approx(1.0, abs=1e-6)


@SHAPES
def test_balance_loss_adds_the_gradient_that_autograd_gives_for_it_through_transformers(
    oracle: Callable[[Shape], Oracle], shape: Shape
) -> None:
    """Of the loss plus 0.7 x the balance of every layer, from the router logits that transformers computes."""
    base, rows = oracle(shape), make_rows(((20, 9), (13,)), seed=5)
    stage = make_stage(base, LoraSettings(("q*_proj", "o_proj"), rank=4), routing=RoutingConfig(aux_loss=0.7))
    loss, seen = gradients(stage, [make_batch(rows)])
    plain = gradients(make_stage(base, LoraSettings(("q*_proj", "o_proj"), rank=4)), [make_batch(rows)])
    leaves = {p.name: p.tensor.detach().clone().requires_grad_() for p in stage.lora_parameters()}
    weights = {}
    for parameter in stage.lora_parameters():
        module = parameter.name.rpartition(".")[0]
        delta = parameter.scale * leaves[f"{module}.lora_B"] @ leaves[f"{module}.lora_A"]
        weights[f"{module}.weight"] = base.model.get_parameter(f"{module}.weight").detach() + delta
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in stage.moe_layers()}
    hooks = [
        base.model.get_submodule(f"model.layers.{layer}.mlp").register_forward_pre_hook(
            lambda module, args, layer=layer: inputs[layer].append(args[0][0])
        )
        for layer in inputs
    ]
    total = documents_loss(lambda ids: functional_call(base.model, weights, (), {"input_ids": ids}), rows)
    for hook in hooks:
        hook.remove()
    balance = torch.zeros(())
    for layer, moe in stage.moe_layers().items():
        first_row, second_row = torch.cat(inputs[layer][:2]), inputs[layer][2]
        for x_TH in (first_row, second_row):
            scores = x_TH @ base.model.get_parameter(f"model.layers.{layer}.mlp.gate.weight").detach().T
            scores = scores.sigmoid() if shape.config["scoring_func"] == "sigmoid" else scores.softmax(-1)
            chosen = torch.zeros_like(scores).scatter_(1, moe.gate.choose(scores.detach()), 1.0)
            share = chosen.mean(0) * scores.shape[1] / shape.config["num_experts_per_tok"]
            balance = balance + (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum() / 2
    (total + 0.7 * balance).backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    expected = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    # Behind the last router there is nothing whose balance an o_proj could change, before it there is.
    assert max(worst_by_kind(seen, expected).values()) < 1e-4
    assert max(worst_by_kind(seen, plain[1]).values()) > 0.01
    measured = sum(moe.statistics.balance_loss for moe in stage.moe_layers().values())
    assert measured == pytest.approx(balance.item(), rel=1e-5)


def limited(base: Oracle, batch: MicroBatch, factor: float, seed: int, *, reroute: bool) -> dict[str, Any]:
    """What `limit_load` makes of random scores, and the choices before it."""
    router, scores = make_router(base, seed, len(batch.token_ids_T))
    before = router.choose(scores)
    after, keep = limit_load(router, scores, before, batch, factor, reroute=reroute)
    return {"router": router, "scores": scores, "before": before, "after": after, "keep": keep}


def capacity(factor: float, num_tokens: int, shape: Shape) -> int:
    """ceil(factor x L x K / E), in whole numbers (`factor` is a multiple of 1/8)."""
    choices: int = shape.config["num_experts_per_tok"]
    experts: int = shape.config["n_routed_experts"]
    return math.ceil(int(factor * 8) * num_tokens * choices / (8 * experts))


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.5])
@SHAPES
def test_dropping_keeps_the_best_scores_of_every_expert_in_a_row_up_to_its_capacity(
    oracle: Callable[[Shape], Oracle], shape: Shape, factor: float
) -> None:
    batch = make_batch(make_rows(LENGTHS))
    found = limited(oracle(shape), batch, factor, 1, reroute=False)
    assert torch.equal(found["after"], found["before"])
    expected = torch.zeros_like(found["keep"])
    for tokens in tokens_of_rows(batch):
        room = capacity(factor, len(tokens), shape)
        for expert in range(shape.config["n_routed_experts"]):
            wanting = [(t, k) for t in tokens for k, e in enumerate(found["before"][t].tolist()) if e == expert]
            wanting.sort(key=lambda place: -float(found["scores"][place[0], expert]))
            for place in wanting[:room]:
                expected[place] = True
    assert torch.equal(found["keep"], expected)
    assert 0 < int(expected.sum()) < sum(map(sum, LENGTHS)) * expected.shape[1]


@pytest.mark.parametrize("reroute", [False, True], ids=["drop", "reroute"])
def test_padding_takes_nobody_s_place(oracle: Callable[[Shape], Oracle], reroute: bool) -> None:
    """Padding with the very best scores of all changes nothing for the row's tokens."""
    batch = make_batch(make_rows(((10,),)), width=64)
    router, scores = make_router(oracle(V3), 2, 64)
    scores[10:] = 0.001
    kept = []
    for padding in (0.001, 0.999):
        scores[10:] = padding
        experts = router.choose(scores)
        after, keep = limit_load(router, scores, experts, batch, 1.0, reroute=reroute)
        assert not keep[10:].any()
        kept.append((after[:10], keep[:10]))
    assert torch.equal(kept[0][0], kept[1][0])
    assert torch.equal(kept[0][1], kept[1][1])


@pytest.mark.parametrize("reroute", [False, True], ids=["drop", "reroute"])
@SHAPES
def test_limits_do_not_depend_on_the_split_into_micro_batches(
    oracle: Callable[[Shape], Oracle], shape: Shape, reroute: bool
) -> None:
    rows = make_rows(LENGTHS)
    whole = make_batch(rows)
    router, scores = make_router(oracle(shape), 3, len(whole.token_ids_T))
    together = limit_load(router, scores, router.choose(scores), whole, 1.0, reroute=reroute)
    for index, (row, tokens) in enumerate(zip(rows, tokens_of_rows(whole), strict=True)):
        alone = make_batch([row], of=rows, first_row=index)
        own = torch.nn.functional.pad(scores[tokens], (0, 0, 0, alone.width - len(tokens)), value=0.5)
        experts, keep = limit_load(router, own, router.choose(own), alone, 1.0, reroute=reroute)
        assert torch.equal(keep[: len(tokens)], together[1][tokens])
        assert torch.equal(experts[: len(tokens)][keep[: len(tokens)]], together[0][tokens][together[1][tokens]])


@SHAPES
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_rerouting_fills_the_room_that_is_left_and_no_more(
    oracle: Callable[[Shape], Oracle], shape: Shape, eighths: int, seed: int, lengths: list[int]
) -> None:
    batch = make_batch(make_rows([(length,) for length in lengths]))
    found = limited(oracle(shape), batch, eighths / 8, seed, reroute=True)
    dropping = limited(oracle(shape), batch, eighths / 8, seed, reroute=False)
    after, keep, scores = found["after"], found["keep"], found["scores"]
    open_to = is_open(found["router"], scores)
    assert torch.equal(after[dropping["keep"]], dropping["before"][dropping["keep"]])
    assert keep[dropping["keep"]].all()
    for tokens in tokens_of_rows(batch):
        room = capacity(eighths / 8, len(tokens), shape)
        kept = {t: [e for e, k in zip(after[t].tolist(), keep[t].tolist(), strict=True) if k] for t in tokens}
        load = [sum(expert in experts for experts in kept.values()) for expert in range(scores.shape[1])]
        assert max(load) <= room
        for token, experts in kept.items():
            assert len(set(experts)) == len(experts)
            assert all(open_to[token, expert] for expert in experts)
            if len(experts) < after.shape[1]:  # a dropped choice: no open expert that is not the token's has room
                free = [e for e in range(scores.shape[1]) if open_to[token, e] and e not in experts and load[e] < room]
                assert free == []


def is_open(router: Router, scores: Tensor) -> Tensor:
    """[T, E]: whether an expert's group is among a token's best groups, counted as the papers say."""
    config = router.config
    if config.n_group == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    is_sigmoid = config.scoring_func == "sigmoid"
    choice = scores + router.e_score_correction_bias if is_sigmoid else scores
    groups = choice.unflatten(1, (config.n_group, -1))
    worth = groups.topk(2).values.sum(-1) if is_sigmoid else groups.amax(-1)
    best = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(config.topk_group).indices, True)
    return best.repeat_interleave(groups.shape[2], 1)


def test_capacity_is_rounded_up_only_where_the_product_is_no_whole_number(oracle: Callable[[Shape], Oracle]) -> None:
    """factor x L x K / E is a whole number for many lengths, and floats must not make it one more."""
    router, _ = make_router(oracle(V2_LITE), 0, 1)
    for num_tokens in range(1, 120):
        batch = make_batch(make_rows(((num_tokens,),)))
        scores = torch.full((len(batch.token_ids_T), 12), 0.01)
        scores[:, :3] = 0.3
        for factor in (1.0, 1.1, 1.2, 1.3, 2.4):
            experts = torch.arange(3).repeat(len(scores), 1)
            _, keep = limit_load(router, scores, experts, batch, factor, reroute=False)
            exact = -(-round(factor * 10) * num_tokens * 3 // 120)
            assert int(keep[:, 0].sum()) == min(num_tokens, exact), (num_tokens, factor)


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_a_limit_that_nothing_reaches_changes_neither_loss_nor_gradient(
    oracle: Callable[[Shape], Oracle], overflow: str
) -> None:
    batches = [make_batch(make_rows(LENGTHS))]
    free = gradients(make_stage(oracle(V3)), batches)
    wide = make_stage(oracle(V3), routing=RoutingConfig(capacity_factor=4.0, overflow=overflow))
    limited = gradients(wide, batches)
    assert limited[0] == free[0]
    assert all(torch.equal(limited[1][name], gradient) for name, gradient in free[1].items())
    statistics = [moe.statistics for moe in wide.moe_layers().values()]
    assert [s.num_dropped for s in statistics] == [0, 0]
    assert [s.num_choices for s in statistics] == [64 * 4, 64 * 4]


def test_limits_hold_in_training_alone(oracle: Callable[[Shape], Oracle]) -> None:
    batch = make_batch(make_rows(LENGTHS))
    tight = make_stage(oracle(V3), routing=RoutingConfig(capacity_factor=0.25))
    free = make_stage(oracle(V3))
    with torch.no_grad():
        trained, evaluated = tight.hidden(None, batch), tight.eval().hidden(None, batch)
        assert torch.equal(evaluated, free.hidden(None, batch))
    assert not torch.allclose(trained, evaluated)


def test_statistics_count_what_is_trained_once_whatever_was_evaluated_before(oracle: Callable[[Shape], Oracle]) -> None:
    """A micro-batch that is computed twice for its gradients counts once, and evaluation counts nothing."""
    batch = make_batch(make_rows(LENGTHS))
    routing = RoutingConfig(aux_loss=0.1, capacity_factor=0.5)
    stage = make_stage(oracle(V3), routing=routing, activation_checkpointing=True)
    with torch.no_grad():
        stage.eval().hidden(None, batch)
    gradients(stage.train(), [batch])
    for moe in stage.moe_layers().values():
        assert moe.statistics.num_choices == 64 * 4
        assert 0 < moe.statistics.num_dropped < 64 * 4
        assert 1 < moe.statistics.balance_loss < 4
        moe.reset_statistics()
        assert moe.statistics.num_choices == 0
