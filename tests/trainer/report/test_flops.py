"""FLOPs of training: against torch's own counter over transformers and PEFT, and against published model sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.plan import TensorInfo
from runtime.trainer.report.flops import (
    LoraSize,
    active_parameters,
    attention_flops,
    base_parameters,
    expert_share,
    head_parameters,
    measure_peak,
    mfu,
    step_flops,
)
from tests.conftest import RecordNumber
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import MOONLIGHT, V2_LITE, V3, Shape

LENGTH = 24

V3_SIZES = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
}
K2_SIZES = V3_SIZES | {
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
}
V2_LITE_SIZES = V3_SIZES | {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
MOONLIGHT_SIZES = V2_LITE_SIZES | {"vocab_size": 163840, "intermediate_size": 11264}


@pytest.mark.parametrize(
    ("name", "sizes", "total", "active"),
    [
        ("V3", V3_SIZES, (671.0, 671.1), (36.5, 37.0)),
        ("K2", K2_SIZES, (1020, 1050), (31.5, 32.5)),
        ("V2-Lite", V2_LITE_SIZES, (15.6, 15.8), (2.3, 2.5)),
        ("Moonlight", MOONLIGHT_SIZES, (15.9, 16.1), (2.24, 3.0)),
    ],
)
def test_parameters_are_those_that_the_publishers_state(
    oracle: Callable[[Shape], Oracle],
    record_number: RecordNumber,
    name: str,
    sizes: dict[str, int | None],
    total: tuple[float, float],
    active: tuple[float, float],
) -> None:
    config = replace(DeepseekConfig.from_dir(oracle(V3).path), **sizes)  # type: ignore[arg-type]
    record_number(f"{name}: parameters, billions", base_parameters(config) / 1e9, at_least=total[0], at_most=total[1])
    num_active = active_parameters(config) + head_parameters(config)
    record_number(f"{name}: active, billions", num_active / 1e9, at_least=active[0], at_most=active[1])


@pytest.mark.parametrize("shape", [V3, V2_LITE, MOONLIGHT], ids=lambda shape: shape.name)
def test_the_base_has_as_many_parameters_as_transformers_counts(
    oracle: Callable[[Shape], Oracle], shape: Shape
) -> None:
    base = oracle(shape)
    state = base.model.state_dict()
    assert base_parameters(DeepseekConfig.from_dir(base.path)) == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("shape", [V3, V2_LITE, MOONLIGHT], ids=lambda shape: shape.name)
def test_a_step_of_a_frozen_base_costs_what_torch_counts(oracle: Callable[[Shape], Oracle], shape: Shape) -> None:
    base = oracle(shape)
    config = DeepseekConfig.from_dir(base.path)
    seen = _counted(_frozen(base))
    assert step_flops(config, [LENGTH], LENGTH, LoraSize(0.0)) + _hidden_half(config) == seen


def test_a_step_with_lora_on_attention_costs_what_torch_counts(oracle: Callable[[Shape], Oracle]) -> None:
    base = oracle(V3)
    config = DeepseekConfig.from_dir(base.path)
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    model = get_peft_model(_frozen(base), LoraConfig(r=4, target_modules=targets))
    num_lora = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    seen = _counted(model)
    assert step_flops(config, [LENGTH], LENGTH, LoraSize(num_lora)) + _hidden_half(config) == seen


def test_documents_attend_only_within_themselves(oracle: Callable[[Shape], Oracle]) -> None:
    config = DeepseekConfig.from_dir(oracle(V3).path)
    assert attention_flops(config, [5, 7]) == attention_flops(config, [5]) + attention_flops(config, [7])
    assert attention_flops(config, [5, 7]) < attention_flops(config, [12])


def test_lora_on_experts_counts_by_the_experts_of_a_token(oracle: Callable[[Shape], Oracle]) -> None:
    config = DeepseekConfig.from_dir(oracle(V3).path)
    size = LoraSize.of(
        [
            TensorInfo("mlp.experts.down_proj A", 1, (16, 8, 40), 8, active_share=expert_share(config)),
            TensorInfo("lm_head B", None, (320, 8), 8),
        ]
    )
    assert size == LoraSize(per_token=4 * 8 * 40, per_target=320 * 8)


def test_mfu_against_a_measured_matmul_is_that_of_the_matmul(record_number: RecordNumber) -> None:
    peak = measure_peak(torch.device("cpu"), torch.float32)
    record_number("measured matmul, GFLOP/s", peak / 1e9, at_least=1)
    assert mfu(peak / 2, 1.0, peak) == 0.5
    with pytest.raises(ValueError, match="above 0"):
        mfu(1.0, 0.0, peak)


def _frozen(base: Oracle) -> torch.nn.Module:
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the ways that torch counts in full
    return AutoModelForCausalLM.from_pretrained(base.path, **ways).requires_grad_(False)


def _counted(model: torch.nn.Module) -> int:
    """FLOPs of forward and backward of one row, the gradient going down to the embedding's output."""
    embedded = model.get_input_embeddings()(torch.arange(LENGTH)[None] + 2).detach().requires_grad_()
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
    return counter.get_total_flops()


def _hidden_half(config: DeepseekConfig) -> int:
    """What a product over all pairs computes beyond the causal half."""
    causal = attention_flops(config, [LENGTH])
    return causal * 2 * LENGTH // (LENGTH + 1) - causal
