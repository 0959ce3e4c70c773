"""Stages in one process over an oracle's base, with random factors, and documents laid out as in training."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.distributed.mesh import MeshShape, make_mesh
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops.base import Ops, make_ops
from runtime.trainer.config import LoraSettings, RoutingConfig
from runtime.trainer.data.batch import collate
from runtime.trainer.data.documents import Document
from runtime.trainer.load import load_stage
from runtime.trainer.micro_batch import MicroBatch, make_micro_batch
from runtime.trainer.parameters import LoraParameter, Side
from runtime.trainer.stage import StageOptions, TrainingStage
from runtime.trainer.step_data import Row, num_target_tokens
from runtime.trainer.targets import resolve_targets

CPU = torch.device("cpu")
ALL_LINEAR = LoraSettings(("all-linear", "lm_head"), rank=4, alpha=8.0)
ROW_TOKENS = 64


class Base(Protocol):
    """A base on disk: an oracle, or one without transformers beside it."""

    @property
    def path(self) -> Path: ...


def make_stage(
    base: Base,
    lora: LoraSettings = ALL_LINEAR,
    *,
    routing: RoutingConfig = RoutingConfig(),  # noqa: B008 - frozen
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    adapted: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device = CPU,
    ops: Ops | None = None,
) -> TrainingStage:
    """The whole base as one stage, both factors of every module random; `adapted`: only these routed experts.

    `ops`: another table than the device's own.
    """
    config = DeepseekConfig.from_dir(base.path)
    layers = range(config.num_hidden_layers)
    options = StageOptions(layers, resolve_targets(config, lora, seed), routing, activation_checkpointing)
    stage = TrainingStage(config, Placement(device, dtype, ops or make_ops(device)), make_mesh(MeshShape()), options)
    load_stage(stage, base.path)
    if adapted is not None:
        for moe in stage.moe_layers().values():
            moe.experts.set_factors(moe.experts.spec, adapted)
    with torch.no_grad():
        for parameter in stage.lora_parameters():
            parameter.tensor.copy_(_random_factor(parameter))
    return stage


def _random_factor(parameter: LoraParameter) -> Tensor:
    """A keeps the size of its input; B makes the change about a third of that, for any rank and scale."""
    generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode()))
    drawn = torch.randn(parameter.tensor.shape, generator=generator) / math.sqrt(parameter.shape[1])
    return drawn if parameter.side is Side.A else drawn * 0.3 / parameter.scale


def make_rows(lengths: Sequence[Sequence[int]], *, seed: int = 0, num_words: int = 300) -> list[Row]:
    """Rows of documents of these lengths over `num_words` different tokens; two thirds of the tokens are learnt."""
    generator = np.random.default_rng(seed)

    def document(length: int) -> Document:
        return Document(generator.integers(2, 2 + num_words, length, np.int32), generator.random(length) < 2 / 3)

    return [tuple(document(length) for length in row) for row in lengths]


def make_batch(
    rows: Sequence[Row],
    *,
    of: Sequence[Row] | None = None,
    first_row: int = 0,
    width: int | None = None,
    device: torch.device = CPU,
) -> MicroBatch:
    """One micro-batch of `rows`, which stand at `first_row` of the step's rows `of` (by default they are all)."""
    step = rows if of is None else of
    return make_micro_batch(
        collate(rows, width),
        device,
        rows=range(first_row, first_row + len(rows)),
        row_tokens=ROW_TOKENS,
        loss_weight=1 / max(1, sum(num_target_tokens(row) for row in step)),
        row_weight=1 / len(step),
    )


def gradients(stage: TrainingStage, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step and the gradient of every factor by name, zeros where nothing reached it."""
    parameters = stage.lora_parameters()
    for parameter in parameters:
        parameter.tensor.grad = None
    total = 0.0
    for batch in batches:
        loss = stage.losses(stage.hidden(None, batch), batch).losses_N.sum() * batch.loss_weight
        loss.backward()
        total += float(loss.detach())
    return total, {p.name: torch.zeros_like(p.tensor) if p.tensor.grad is None else p.tensor.grad for p in parameters}
