"""One training step on the demo model: loss and gradients against those of the plain reference on the CPU."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.demo import MODEL_DIR
from runtime.distributed.mesh import MeshShape, make_mesh
from runtime.doctor.finding import Finding
from runtime.doctor.run import FAILED, PASSED
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops import reference
from runtime.ops.base import Ops
from runtime.ops.device_info import synchronise
from runtime.ops.lora_rows import LoraRows
from runtime.trainer.config import LoraSettings, RoutingConfig
from runtime.trainer.data.batch import collate
from runtime.trainer.data.documents import Document
from runtime.trainer.load import load_stage
from runtime.trainer.micro_batch import MicroBatch, make_micro_batch
from runtime.trainer.parameters import LoraParameter, Side
from runtime.trainer.stage import StageOptions, TrainingStage
from runtime.trainer.step_data import num_target_tokens
from runtime.trainer.targets import resolve_targets

TRAINING = "training step"
LORA = LoraSettings(("experts", "q_b_proj", "kv_b_proj", "o_proj"), rank=8, alpha=16.0)
LENGTHS = ((60, 48), (96,), (17, 30, 50))
ROW_TOKENS = 128
# Relative; a gradient is compared by the norm of the difference over its own, all factors joined. In 16 bits the router
# may choose other experts for some tokens, so that float32 is what tells.
MAX_LOSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MAX_GRADIENT_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.25}
CPU = torch.device("cpu")


class ReferenceOps(Ops):
    """The table in plain PyTorch throughout."""

    def grouped_matmul(self, x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_matmul`."""
        return reference.grouped_matmul(x_MK, weight_GJKW, counts_G)

    def grouped_outer(self, x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_outer`."""
        return reference.grouped_outer(x_MK, y_MN, counts_G)

    def lora_add_(self, y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], lora: LoraRows) -> None:
        """See `Ops.lora_add_`."""
        reference.lora_add_(y_MN, x_MK, a_PKR, bs_PRN, lora)


def check_training(ops: Ops, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Finding]:
    """A finding for each dtype; raises what an operation raises."""
    expected_loss, expected, _ = _step(Placement(CPU, torch.float32, ReferenceOps()))
    return [_finding(Placement(device, dtype, ops), expected_loss, expected) for dtype in dtypes]


def _finding(placement: Placement, expected_loss: float, expected: Tensor) -> Finding:
    loss, gradient, facts = _step(placement)
    loss_error = abs(loss - expected_loss) / expected_loss
    gradient_error = float((gradient - expected).norm() / expected.norm())
    facts |= {
        "loss": round(loss, 6),
        "reference_loss": round(expected_loss, 6),
        "loss_error": loss_error,
        "loss_error_bound": MAX_LOSS_ERROR[placement.dtype],
        "gradient_error": gradient_error,
        "gradient_error_bound": MAX_GRADIENT_ERROR[placement.dtype],
    }
    problems = []
    if not bool(gradient.isfinite().all()):
        problems.append("gradients are not finite")
    if not loss_error <= MAX_LOSS_ERROR[placement.dtype]:
        problems.append(f"the loss is {loss:.6f}, the reference's {expected_loss:.6f}")
    if not gradient_error <= MAX_GRADIENT_ERROR[placement.dtype]:
        problems.append(f"the gradients differ by {gradient_error:.2g} of their norm")
    name = f"{TRAINING}, {str(placement.dtype).removeprefix('torch.')}"
    return Finding(name, FAILED if problems else PASSED, facts, "; ".join(problems))


def _step(placement: Placement) -> tuple[float, Tensor, dict[str, float | int | str]]:
    """The loss, all gradients in one float32 row on the CPU, and how fast it was."""
    stage, batch = _stage(placement), _batch(placement.device)
    parameters = stage.lora_parameters()

    def step() -> float:
        for parameter in parameters:
            parameter.tensor.grad = None
        losses_N = stage.losses(stage.hidden(None, batch), batch).losses_N
        loss = losses_N.sum() * batch.loss_weight
        loss.backward()
        return float(loss.detach())

    loss = step()
    rows = [torch.zeros_like(p.tensor) if p.tensor.grad is None else p.tensor.grad for p in parameters]
    gradient = torch.cat([row.detach().float().cpu().flatten() for row in rows])
    start = time.perf_counter()
    step()
    synchronise(placement.device)
    seconds = time.perf_counter() - start
    num_tokens = len(LENGTHS) * ROW_TOKENS
    return loss, gradient, {"tokens": num_tokens, "step_ms": round(seconds * 1e3, 2),
                            "tokens_per_second": round(num_tokens / seconds, 1)}  # fmt: skip


def _stage(placement: Placement) -> TrainingStage:
    """The demo model with random factors that follow from their names."""
    config = DeepseekConfig.from_dir(MODEL_DIR)
    options = StageOptions(range(config.num_hidden_layers), resolve_targets(config, LORA, 0), RoutingConfig(), False)
    stage = TrainingStage(config, placement, make_mesh(MeshShape()), options)
    load_stage(stage, MODEL_DIR)
    with torch.no_grad():
        for parameter in stage.lora_parameters():
            parameter.tensor.copy_(_random_factor(parameter))
    return stage


def _random_factor(parameter: LoraParameter) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode()))
    drawn = torch.randn(parameter.tensor.shape, generator=generator) / math.sqrt(parameter.shape[1])
    return drawn if parameter.side is Side.A else drawn * 0.1 / parameter.scale


def _batch(device: torch.device) -> MicroBatch:
    """Rows of documents of random tokens, all learnt but each one's first."""
    generator = np.random.default_rng(0)

    def document(length: int) -> Document:
        return Document(generator.integers(2, 1000, length, np.int32), np.arange(length) > 0)

    rows = [tuple(document(length) for length in row) for row in LENGTHS]
    num_targets = sum(num_target_tokens(row) for row in rows)
    return make_micro_batch(collate(rows, ROW_TOKENS), device, rows=range(len(rows)), row_tokens=ROW_TOKENS,
                            loss_weight=1 / num_targets, row_weight=1 / len(rows))  # fmt: skip
