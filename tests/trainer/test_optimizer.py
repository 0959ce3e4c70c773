"""The learning rate against transformers' schedules, and AdamW against its formula, with a rate of its own for B."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from runtime.trainer.config import OptimizerConfig
from runtime.trainer.optimizer import learning_rate, make_optimizer, set_learning_rate
from runtime.trainer.parameters import LoraParameter, Side
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V3, Shape
from tests.trainer.stages import gradients, make_batch, make_rows, make_stage


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 1), (0, 20), (5, 20), (19, 20), (30, 20)])
def test_rates_equal_those_of_transformers(schedule: str, warmup: int, num_steps: int) -> None:
    """Our step n has their rate after n steps, so that the first step learns something."""
    import transformers

    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, dummy, warmup, num_steps)
    config = OptimizerConfig(lr=3e-3, min_lr_ratio=0.0, schedule=schedule, warmup_steps=warmup)
    for step in range(1, num_steps + 1):
        dummy.step()
        theirs.step()
        assert learning_rate(config, step, num_steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_falls_to_its_least_share_at_the_last_step(schedule: str) -> None:
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.25, schedule=schedule, warmup_steps=4)
    rates = [learning_rate(config, step, 50) for step in range(1, 51)]
    assert rates[3] == max(rates) == 2.0
    assert rates[-1] == min(rates[4:]) == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in pairwise(rates[3:]))


def test_b_has_its_rate_in_proportion_and_every_factor_is_trained_once(oracle: Callable[[Shape], Oracle]) -> None:
    parameters = make_stage(oracle(V3)).lora_parameters()
    optimizer = make_optimizer(parameters, OptimizerConfig(lora_plus_ratio=16.0))
    set_learning_rate(optimizer, 1e-3)
    rates = {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == len(parameters)
    for parameter in parameters:
        assert rates[id(parameter.tensor)] == pytest.approx(1e-3 if parameter.side is Side.A else 1.6e-2)


def test_three_steps_follow_the_formula_of_adamw() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6, lora_plus_ratio=3.0)
    tensors = {side: nn.Parameter(torch.randn(4, 3)) for side in Side}
    parameters = [LoraParameter(f"m.{side}", side, tensor, (4, 3), 1.0) for side, tensor in tensors.items()]
    optimizer = make_optimizer(parameters, config)
    expected = {side: tensor.detach().double().clone() for side, tensor in tensors.items()}
    first = {side: torch.zeros(4, 3, dtype=torch.float64) for side in Side}
    second = {side: torch.zeros(4, 3, dtype=torch.float64) for side in Side}
    for step in range(1, 4):
        set_learning_rate(optimizer, 0.1 / step)
        for side, tensor in tensors.items():
            grad = torch.randn(4, 3)
            tensor.grad = grad
            rate = 0.1 / step * (3.0 if side is Side.B else 1.0)
            first[side] = 0.8 * first[side] + 0.2 * grad
            second[side] = 0.9 * second[side] + 0.1 * grad.double() ** 2
            mean, square = first[side] / (1 - 0.8**step), second[side] / (1 - 0.9**step)
            expected[side] = expected[side] * (1 - rate * 0.2) - rate * mean / (square.sqrt() + 1e-6)
        optimizer.step()
    for side, tensor in tensors.items():
        torch.testing.assert_close(tensor.detach().double(), expected[side], atol=1e-6, rtol=1e-5)


def test_training_on_one_batch_lowers_its_loss(oracle: Callable[[Shape], Oracle]) -> None:
    stage = make_stage(oracle(V3))
    optimizer = make_optimizer(stage.lora_parameters(), OptimizerConfig())
    set_learning_rate(optimizer, 1e-2)
    batch = make_batch(make_rows(((20, 12),)))
    losses = []
    for _ in range(8):
        losses.append(gradients(stage, [batch])[0])
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
