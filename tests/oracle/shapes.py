"""The model shapes that Graft serves, as tiny configurations with every part that the real ones have.

Dimensions differ from each other on purpose, so that a transposed or swapped weight cannot fit. Each shape is written
as its publisher writes config.json (`rope_scaling`) or as transformers 5 does (`rope_parameters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 320


@dataclass(frozen=True)
class Shape:
    """`config` holds what config.json says; `disk_model_type` is written last, for types transformers cannot read."""

    name: str
    config: dict[str, Any]
    rope_theta: float
    yarn: dict[str, Any] | None = None
    classic_rope: bool = True
    disk_model_type: str | None = None
    seed: int = 0

    @property
    def model_type(self) -> str:
        """The type under which transformers knows this shape."""
        return str(self.config["model_type"])


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-6,
}
_V3: dict[str, Any] = _COMMON | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 48,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840,
}
_V2: dict[str, Any] = _COMMON | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
}


def _yarn(factor: float, *, mscale: float, beta_fast: float = 32.0) -> dict[str, Any]:
    return {
        "factor": factor,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


V3 = Shape("V3", _V3, rope_theta=10_000.0, yarn=_yarn(40.0, mscale=1.0), seed=1)
V2_LITE = Shape("V2-Lite", _V2, rope_theta=10_000.0, yarn=_yarn(40.0, mscale=0.707), seed=2)
V2_GROUPED = Shape(
    "V2-grouped",
    _V2
    | {
        "q_lora_rank": 40,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
    },
    rope_theta=10_000.0,
    yarn=_yarn(40.0, mscale=0.707),
    classic_rope=False,
    seed=3,
)
MOONLIGHT = Shape(
    "Moonlight",
    _V3
    | {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
    rope_theta=50_000.0,
    classic_rope=False,
    seed=4,
)
K2 = Shape(
    "K2",
    _V3
    | {
        "n_routed_experts": 24,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 131072,
    },
    rope_theta=50_000.0,
    yarn=_yarn(32.0, mscale=1.0, beta_fast=1.0),
    disk_model_type="kimi_k2",
    seed=5,
)

SHAPES = (V3, V2_LITE, V2_GROUPED, MOONLIGHT, K2)
