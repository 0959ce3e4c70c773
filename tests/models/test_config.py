"""config.json: the published shapes are read as they are meant, and what is wrong is refused by its key."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config

from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.model import load_model
from runtime.ops.base import make_ops
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import MOONLIGHT, V3, Shape

COUNTS = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 32,
    "n_routed_experts": 64, "num_experts_per_tok": 4, "max_position_embeddings": 4096,
}  # fmt: skip
COMPLETE = COUNTS | {
    "model_type": "deepseek_v3", "q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.0,
}  # fmt: skip


def _read(folder: Path, **keys: object) -> DeepseekConfig:
    (folder / "config.json").write_text(json.dumps(keys))
    return DeepseekConfig.from_dir(folder)


@pytest.mark.parametrize(
    ("model_type", "published"), [("deepseek_v3", DeepseekV3Config()), ("deepseek_v2", DeepseekV2Config())]
)
def test_keys_that_are_left_out_mean_what_transformers_takes_them_for(
    tmp_path: Path, model_type: str, published: DeepseekV3Config | DeepseekV2Config
) -> None:
    config = _read(tmp_path, **COUNTS, model_type=model_type)
    for key in ("q_lora_rank", "n_shared_experts", "first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor"):
        assert getattr(config, key) == getattr(published, key), key
    assert (config.n_group, config.topk_group) == (published.n_group or 1, published.topk_group or 1)


def test_a_kimi_file_must_be_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks .*n_group.*routed_scaling_factor"):
        _read(tmp_path, **COUNTS, model_type="kimi_k2")


@pytest.mark.parametrize(
    ("key", "value"),
    [("routed_scaling_factor", None), ("first_k_dense_replace", None), ("vocab_size", "320"), ("hidden_act", "gelu"),
     ("n_group", 7), ("topk_group", 2), ("num_experts_per_tok", 65), ("scoring_func", "softmax"),
     ("model_type", "llama"), ("moe_layer_freq", 2), ("kv_lora_rank", 0),
     ("rope_scaling", {"type": "linear", "factor": 2.0}),
     ("rope_scaling", {"type": "yarn"}), ("rope_scaling", {"type": "yarn", "factor": 4.0, "new_key": 1})],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    assert _read(tmp_path, **COMPLETE).routed_scaling_factor == 2.0
    word = {"rope_scaling": "(?i)yarn|rope type"}.get(key, key)
    with pytest.raises(ValueError, match=word):
        _read(tmp_path, **(COMPLETE | {key: value}))


def test_layers_for_multi_token_prediction_are_skipped_and_the_log_says_so(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = oracle(MOONLIGHT).path
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = DeepseekConfig.from_dir(tmp_path)
    name = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    save_file({name: torch.zeros(4, 8)}, tmp_path / "mtp.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "mtp.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO):
        load_model(tmp_path, config, Placement(cpu, torch.float32, make_ops(cpu)))
    assert f"model.layers.{config.num_hidden_layers}" in caplog.text


def test_the_published_shapes_of_the_oracles_are_read(oracle: Callable[[Shape], Oracle]) -> None:
    assert DeepseekConfig.from_dir(oracle(V3).path).yarn is not None
    assert DeepseekConfig.from_dir(oracle(MOONLIGHT).path).yarn is None
