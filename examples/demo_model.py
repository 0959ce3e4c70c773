"""The demo base: its shape, and how it is written to disk in the form that published DeepSeek checkpoints have."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from demo_init import set_copying_heads
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

DEMO_DIR = Path(__file__).resolve().parent.parent / "runtime" / "demo"
MODEL_DIR = DEMO_DIR / "model"
ADAPTERS_DIR = DEMO_DIR / "adapters"
BASE_NAME = "graft-demo"

# The on-disk form: `rope_scaling` and `rope_theta`, as every published DeepSeek-V3 config has them.
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.05,
    "intermediate_size": 512,
    "kv_lora_rank": 96,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 6,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 1024,
}


def build_model(seed: int) -> DeepseekV3ForCausalLM:
    """A freshly initialised fp32 model, with the heads that copy set by hand."""
    torch.manual_seed(seed)
    config = copy.deepcopy(MODEL_CONFIG)
    config.pop("torch_dtype")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).float()
    set_copying_heads(model)
    return model


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> DeepseekV3ForCausalLM:
    """The model from disk, in inference mode."""
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def routers(model: DeepseekV3ForCausalLM) -> list[nn.Module]:
    """The router of every MoE layer, in layer order."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def save_model(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Write bf16 weights with per-expert names, the correction biases in fp32, and the classic config."""
    rounded = copy.deepcopy(model)
    nn.Module.to(rounded, torch.bfloat16)
    for source, target in zip(routers(model), routers(rounded), strict=True):
        target.e_score_correction_bias = source.get_buffer("e_score_correction_bias").detach().clone().float()
    rounded.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n")
    generation = {"bos_token_id": 0, "do_sample": False, "eos_token_id": 1, "pad_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
