"""The CUDA back-end in training: its operations on the CPU in every run, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.ops.cuda.ops import CudaOps
from runtime.trainer.config import LoraSettings, RoutingConfig
from tests.conftest import RecordNumber
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V2_LITE, V3, Shape
from tests.trainer.stages import gradients, make_batch, make_rows, make_stage

ROWS = make_rows(((14, 9), (21,), (1, 5, 12)), seed=3, num_words=5)
# A rank that no grouped product takes as it is, dropout, and a capacity that drops.
LORA = LoraSettings(("all-linear", "lm_head"), rank=3, alpha=6.0, dropout=0.1)
ROUTING = RoutingConfig(aux_loss=0.1, capacity_factor=1.0)
GPU = torch.device("cuda")


def _worst(seen: dict[str, torch.Tensor], asked: dict[str, torch.Tensor]) -> float:
    return max(
        float((seen[name].cpu() - grad).abs().max()) / max(float(grad.abs().max()), 1e-6)
        for name, grad in asked.items()
        if grad.numel()
    )


@pytest.mark.parametrize("adapted", [None, (1, 4, 9)], ids=["all experts", "three experts"])
@pytest.mark.parametrize("shape", [V3, V2_LITE], ids=lambda shape: shape.name)
def test_the_cuda_operations_give_the_same_gradients_on_the_cpu(
    oracle: Callable[[Shape], Oracle], shape: Shape, adapted: tuple[int, ...] | None, record_number: RecordNumber
) -> None:
    base, batch = oracle(shape), make_batch(ROWS)
    loss, asked = gradients(make_stage(base, LORA, routing=ROUTING, adapted=adapted), [batch])
    stage = make_stage(base, LORA, routing=ROUTING, adapted=adapted, ops=CudaOps())
    seen_loss, seen = gradients(stage, [batch])
    assert seen_loss == pytest.approx(loss, rel=1e-5)
    record_number(f"{shape.name}: gradients by CUDA's operations, relative", _worst(seen, asked), at_most=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [V3, V2_LITE], ids=lambda shape: shape.name)
def test_a_gpu_gives_the_gradients_of_the_cpu(
    oracle: Callable[[Shape], Oracle], shape: Shape, record_number: RecordNumber
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    base = oracle(shape)
    loss, asked = gradients(make_stage(base, LORA, routing=ROUTING), [make_batch(ROWS)])
    stage = make_stage(base, LORA, routing=ROUTING, device=GPU)
    seen_loss, seen = gradients(stage, [make_batch(ROWS, device=GPU)])
    assert seen_loss == pytest.approx(loss, rel=1e-5)
    record_number(f"{shape.name}: gradients on the GPU, relative", _worst(seen, asked), at_most=1e-4)
