"""Adapters that PEFT wrote mean to this package exactly what they mean to PEFT (its own merge is the oracle)."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_builders import (
    EXPERTS,
    TinyModel,
    assert_same_deltas,
    expert_factors,
    factors,
    make_model,
    merged_deltas,
    our_deltas,
    peft_model,
    save_peft,
    write_adapter,
)

from loaders.adapter import load_adapter

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "attention_and_head": {"target_modules": [*ATTENTION, "lm_head"]},
    "experts": {"target_modules": [], "target_parameters": STACKS},
    "gate_up_only": {"target_modules": [], "target_parameters": STACKS[:1]},
    "down_only": {"target_modules": [], "target_parameters": STACKS[1:]},
    "everything": {
        "target_modules": [*ATTENTION, "lm_head"],
        "target_parameters": [*STACKS, *(f"{kind}_proj.weight" for kind in ("gate", "up", "down"))],
    },
    "ranks_and_alphas": {
        "target_modules": ATTENTION,
        "target_parameters": [*STACKS, "shared_experts.up_proj.weight"],
        "rank_pattern": {"mlp.experts.gate_up_proj": 6, "kv_b_proj": 2, r"layers\.1\.self_attn\.o_proj": 7},
        "alpha_pattern": {
            "mlp.experts.down_proj": 5,
            "layers.2.self_attn.q_a_proj": 3,
            r".*\.o_proj": 9,
            "shared_experts.up_proj": 100,  # PEFT matches `...up_proj.weight` here, so this key has no effect
        },
    },
    "rslora": {"target_modules": ATTENTION, "target_parameters": STACKS, "use_rslora": True},
    "odd_rank_3": {"r": 3, "lora_alpha": 7, "target_modules": ["o_proj"], "target_parameters": STACKS},
    "converted_by_peft": {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_saved_by_peft_gives_the_weights_that_peft_merges(
    tiny: TinyModel, tmp_path: Path, case: str
) -> None:
    model = peft_model(**{"r": 4, "lora_alpha": 8} | CASES[case])
    weights = load_adapter(save_peft(model, tmp_path / "adapter"), tiny.targets)
    theirs = merged_deltas(model, tiny.tensors, tmp_path / "merged")
    assert theirs
    assert_same_deltas(our_deltas(weights), theirs)
    assert weights.warnings == ()


def reload_with_peft(path: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(make_model(), path)


def test_per_expert_files_mean_what_peft_makes_of_them_and_so_does_its_own_copy(
    tiny: TinyModel, tmp_path: Path
) -> None:
    tensors = factors("model.layers.0.self_attn.o_proj", 48, 24)
    for layer in (1, 2):
        for expert in range(EXPERTS):
            tensors |= expert_factors(layer, expert)
    modules = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    for layer in (1, 2):
        tensors |= factors(f"model.layers.{layer}.self_attn.o_proj", 48, 24, seed=layer)
    path = write_adapter(tmp_path / "old", tensors, target_modules=modules)
    per_expert = load_adapter(path, tiny.targets)
    assert per_expert.layout.startswith("PEFT per-expert 2-D factors")

    model = reload_with_peft(path)
    stacked = load_adapter(save_peft(model, tmp_path / "resaved"), tiny.targets)
    assert stacked.layout.startswith("PEFT ParamWrapper")
    theirs = merged_deltas(model, tiny.tensors, tmp_path / "merged")
    assert_same_deltas(our_deltas(per_expert), theirs)
    assert_same_deltas(our_deltas(stacked), theirs)

    # The block-diagonal stack of rank 2r is taken apart again: same rank, same factors, same bytes as the original.
    for layer, experts in per_expert.experts.items():
        for expert, lora in experts.items():
            again = stacked.experts[layer][expert]
            for kind in ("gate", "up", "down"):
                before, after = getattr(lora, kind), getattr(again, kind)
                assert (after.lora_rank, after.scale) == (before.lora_rank, before.scale)
                assert torch.equal(after.a, before.a)
                assert torch.equal(after.b, before.b)
    assert stacked.num_bytes == per_expert.num_bytes


def test_experts_that_training_never_reached_are_left_out_of_a_stacked_adapter(tiny: TinyModel, tmp_path: Path) -> None:
    model = peft_model(r=4, lora_alpha=8, target_modules=[], target_parameters=STACKS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            idle = (0, 2) if "layers.1" in name else (0, 1, 2, 3)
            with torch.no_grad():
                parameter.view(parameter.shape[0], -1, EXPERTS)[:, :, idle] = 0
    path = save_peft(model, tmp_path / "adapter")
    weights = load_adapter(path, tiny.targets)
    assert {layer: sorted(experts) for layer, experts in weights.experts.items()} == {1: [1, 3]}
    reasons = dict(weights.skipped)
    assert "2 of 4 experts is all zero" in reasons["model.layers.1.mlp.experts.gate_up_proj"]
    assert "4 of 4 experts is all zero" in reasons["model.layers.2.mlp.experts.down_proj"]
    assert_same_deltas(our_deltas(weights), merged_deltas(model, tiny.tensors, tmp_path / "merged"))
    # Two experts: A [4, 48] shared by gate and up, their B [16, 4] each, down A [4, 16] and B [48, 4].
    assert weights.num_bytes == 2 * 4 * (4 * 48 + 2 * 16 * 4 + 4 * 16 + 48 * 4)


def test_an_untrained_adapter_loads_with_a_warning(tiny: TinyModel, tmp_path: Path) -> None:
    model = peft_model(r=4, lora_alpha=8, target_modules=["o_proj"], target_parameters=STACKS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    weights = load_adapter(save_peft(model, tmp_path), tiny.targets)
    assert weights.experts == {}
    assert len(weights.warnings) == 1
    assert "no effect" in weights.warnings[0]


def test_bfloat16_factors_stay_bfloat16(tiny: TinyModel, tmp_path: Path) -> None:
    model = peft_model(r=4, lora_alpha=8, target_modules=["o_proj"], target_parameters=STACKS).bfloat16()
    weights = load_adapter(save_peft(model, tmp_path), tiny.targets)
    down = weights.experts[1][0].down
    assert down is not None
    assert {down.a.dtype, down.b.dtype, weights.linears["model.layers.0.self_attn.o_proj"].a.dtype} == {torch.bfloat16}
