"""Every option of PEFT's LoraConfig is honoured, harmless, or refused by its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_builders import write_adapter
from peft import LoraConfig

from loaders.adapter import AdapterTargets, ExpertShape, load_adapter
from loaders.errors import AdapterError
from tests.loaders.formats.layouts import ALPHA, RANK, TARGETS, per_expert

HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "peft_version"}
# They say how training chose or initialised the factors that the file holds, or which base they are for.
HARMLESS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": {"base_model_class": "X"},
    "base_model_name_or_path": "someone/some-model",
    "revision": "main",
    "inference_mode": True,
    "target_modules": ["o_proj"],
    "exclude_modules": ["lm_head"],
    "lora_dropout": 0.1,
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "megatron_config": {"a": 1},
    "megatron_core": "megatron.core",
    "loftq_config": {"a": 1},
    "eva_config": {"a": 1},
    "corda_config": {"a": 1},
    "qalora_group_size": 16,
    "runtime_config": {"a": 1},
    "ensure_weight_tying": True,
}
REFUSED: dict[str, Any] = {
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa",
    "trainable_token_indices": [1],
    "lora_ga_config": {"a": 1},
    "use_dora": True,
    "velora_config": {"a": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": {"a": 1},
    "layer_replication": [[0, 1]],
    "lora_bias": True,
    "use_bdlora": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
}


def write(path: Path, **config: Any) -> Path:
    return write_adapter(path, per_expert().tensors, **{"r": RANK, "lora_alpha": ALPHA} | config)


def test_no_option_of_the_installed_peft_is_forgotten() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= HONOURED | HARMLESS.keys() | REFUSED.keys()


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_changes_the_weights_is_refused_by_name(tmp_path: Path, option: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(write(tmp_path, **{option: REFUSED[option]}), TARGETS)
    assert len(caught.value.problems) == 1
    assert f"adapter_config.json: {option} " in caught.value.problems[0]


@pytest.mark.parametrize("option", HARMLESS)
def test_an_option_that_does_not_change_the_weights_is_taken(tmp_path: Path, option: str) -> None:
    assert load_adapter(write(tmp_path, **{option: HARMLESS[option]}), TARGETS).experts


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", False])
def test_an_initialisation_that_leaves_the_base_alone_is_taken(tmp_path: Path, init: object) -> None:
    assert load_adapter(write(tmp_path, init_lora_weights=init), TARGETS).experts


@pytest.mark.parametrize(
    ("base_name", "model_type", "is_refused"),
    [
        ("moonshotai/Moonlight-16B-A3B-Instruct", "deepseek_v2", True),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek_v3", True),
        ("moonshotai/Moonlight-16B-A3B", "deepseek_v3", False),
        ("deepseek-ai/DeepSeek-V2-Lite", "deepseek_v2", False),
        ("someone/a-model", "deepseek_v2", False),
        (None, "deepseek_v2", False),
    ],
)
def test_twins_in_shape_are_told_apart_by_the_name_of_the_base(
    tmp_path: Path, base_name: str | None, model_type: str, is_refused: bool
) -> None:
    """V2-Lite and Moonlight have experts of the same number and widths."""
    name = "base_model.model.model.layers.1.mlp.experts.0.up_proj.lora_"
    tensors = {f"{name}A.weight": torch.ones(1, 2048), f"{name}B.weight": torch.ones(1408, 1)}
    targets = AdapterTargets({}, {1: ExpertShape(64, 2048, 1408)}, 27, model_type)
    path = write_adapter(tmp_path, tensors, r=1, base_model_name_or_path=base_name)
    if not is_refused:
        assert load_adapter(path, targets).experts
        return
    with pytest.raises(AdapterError, match="the shapes are equal, the models are not"):
        load_adapter(path, targets)
