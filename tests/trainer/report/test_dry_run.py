"""The dry run: its tables add up, its memory is what torch keeps, and its text names what will be trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.plan import RunPlan, StageInfo, TensorInfo, process_memory
from runtime.trainer.report.activations import activation_bytes, logit_bytes
from runtime.trainer.report.dry_run import describe_run, format_layers
from runtime.trainer.report.flops import CONVENTION
from tests.conftest import RecordNumber
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V2_LITE, V3, Shape

GIB = 2**30


def plan(dtype: str = "bfloat16", *, checkpointing: bool = False) -> RunPlan:
    tensors = [
        TensorInfo("mlp.experts.down_proj A", layer, (64, 16, 512), 16, pp_stage=layer // 4, num_shards=2)
        for layer in (1, 2, 3, 4, 6)
    ]
    tensors.append(TensorInfo("lm_head B", None, (8192, 16), 16, pp_stage=1))
    stages = [
        StageInfo((0, 1, 2, 3), GIB, activation_bytes=3 * GIB, checkpointed_bytes=GIB),
        StageInfo((4, 5, 6), GIB // 2, activation_bytes=2 * GIB, checkpointed_bytes=GIB),
    ]
    return RunPlan(tensors, stages, 790_000_000, dtype, checkpointing, 4, 4096, 1.5e15)


def test_the_report_counts_what_is_trained() -> None:
    text = describe_run(plan())
    (row,) = (line for line in text.splitlines() if "down_proj A" in line)
    assert " ".join(row.split()) == "mlp.experts.down_proj A 1-4, 6 64 x 16 x 512 16 5 2,621,440"
    assert "2,752,512 trainable parameters, 0.348% of the base's 790,000,000" in text
    assert "frozen: router" in text
    assert f"1.500e+15 FLOPs for each step of 4,096 tokens on 4 processes\n  ({CONVENTION})" in text


def test_memory_of_a_process_counts_its_own_shards() -> None:
    own = 3 * 64 * 16 * 512 // 2
    memory = process_memory(plan(), 0, checkpointing=False)
    assert (memory.base, memory.activations) == (2 * GIB, 3 * GIB)
    assert (memory.master, memory.gradients, memory.moments, memory.copies) == (4 * own, 4 * own, 8 * own, 2 * own)
    assert memory.total == 5 * GIB + 18 * own


def test_the_table_shows_each_stage_with_and_without_checkpointing() -> None:
    lines = describe_run(plan(checkpointing=True)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Memory of each process"))
    assert "with activation checkpointing" in lines[start]
    assert "  of tensors alone: the process with its libraries" in lines[start + 4], "what the estimate leaves out"
    assert [line.split()[-2:] for line in lines[start + 2 : start + 4]] == [["3.013", "5.013"], ["2.011", "3.011"]]


def test_fp32_compute_needs_no_second_copy_of_the_factors() -> None:
    memory = process_memory(plan("float32"), 1, checkpointing=False)
    assert memory.copies == 0
    assert memory.base == 2 * GIB


@pytest.mark.parametrize(("layers", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 5], "0-2, 5"), ([3, 1, 1], "1, 3")])
def test_layers_are_written_as_ranges(layers: list[int], text: str) -> None:
    assert format_layers(layers) == text


@pytest.mark.parametrize("shape", [V3, V2_LITE], ids=lambda shape: shape.name)
def test_the_activation_estimate_is_near_what_torch_keeps_for_transformers(
    oracle: Callable[[Shape], Oracle], record_number: RecordNumber, shape: Shape
) -> None:
    base, num_tokens = oracle(shape), 64
    model = AutoModelForCausalLM.from_pretrained(base.path, experts_implementation="grouped_mm")
    config = DeepseekConfig.from_dir(base.path)
    layers = range(config.num_hidden_layers)
    kept = _kept_bytes(model.requires_grad_(False), num_tokens)
    seen = activation_bytes(config, layers, num_tokens, element_bytes=4, checkpointing=False) / kept
    record_number(f"{shape.name}: estimated activations to those kept", seen, at_least=0.5, at_most=2.0)


def test_checkpointing_keeps_less_and_pipelines_keep_more(oracle: Callable[[Shape], Oracle]) -> None:
    config = DeepseekConfig.from_dir(oracle(V3).path)

    def estimate(checkpointing: bool, num_in_flight: int = 1) -> int:
        return activation_bytes(
            config, range(3), 100, element_bytes=2, checkpointing=checkpointing, num_in_flight=num_in_flight
        )

    assert estimate(True) < estimate(False)
    assert estimate(False, 4) == 4 * estimate(False)
    assert logit_bytes(config, 10, tensor_shards=2) == 10 * 320 // 2 * 12


def _kept_bytes(model: torch.nn.Module, num_tokens: int) -> int:
    """Bytes of all storages that autograd keeps of one forward pass of the layers, weights apart."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embedded = model.get_input_embeddings()(torch.arange(num_tokens)[None]).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.requires_grad
    return num_bytes
