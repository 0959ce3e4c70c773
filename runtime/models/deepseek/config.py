"""The shape of a DeepSeek model: V3 / R1 / V3.1, V2 / V2-Lite, Moonlight and Kimi-K2, from one config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loaders.adapter import AdapterTargets, ExpertShape
from loaders.config_json import read_config

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN parameters (Peng et al. 2023, arXiv:2309.00071), named as in config.json."""

    factor: float
    original_max_position_embeddings: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class DeepseekConfig:
    """Field names are those of config.json. `q_lora_rank` None: queries have one projection."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    stored_dtype: str | None

    @classmethod
    def from_dir(cls, model_dir: Path) -> DeepseekConfig:
        """Read `model_dir`/config.json; raises ValueError naming each key that is missing or not supported."""
        raw = read_config(model_dir)
        config = cls(**_fields(raw, model_dir))
        try:
            config.validate()
        except ValueError as cause:
            raise ValueError(f"{model_dir}/{cause}") from None
        return config

    def validate(self) -> None:
        """Raise ValueError naming the key, its value and what is allowed."""
        checks = (
            ("model_type", self.model_type, self.model_type in MODEL_TYPES, f"one of {', '.join(MODEL_TYPES)}"),
            ("scoring_func", self.scoring_func, self.scoring_func in ("sigmoid", "softmax"), "sigmoid or softmax"),
            (
                "topk_method",
                self.topk_method,
                self.topk_method in ("noaux_tc", "greedy", "group_limited_greedy"),
                "noaux_tc, greedy or group_limited_greedy",
            ),
            ("qk_rope_head_dim", self.qk_rope_head_dim, self.qk_rope_head_dim % 2 == 0, "an even number"),
            (
                "n_group",
                self.n_group,
                self.n_group >= 1 and self.n_routed_experts % self.n_group == 0,
                f"a divisor of n_routed_experts ({self.n_routed_experts})",
            ),
            ("topk_group", self.topk_group, 1 <= self.topk_group <= self.n_group, f"1..n_group ({self.n_group})"),
            (
                "num_experts_per_tok",
                self.num_experts_per_tok,
                1 <= self.num_experts_per_tok <= self.n_routed_experts // self.n_group * self.topk_group,
                "at most the experts of the chosen groups",
            ),
            (
                "scoring_func",
                self.scoring_func,
                (self.scoring_func == "sigmoid") == (self.topk_method == "noaux_tc"),
                "sigmoid with noaux_tc, softmax with greedy or group_limited_greedy",
            ),
            (
                "norm_topk_prob",
                self.norm_topk_prob,
                self.scoring_func == "sigmoid" or not self.norm_topk_prob,
                "false with softmax scoring",
            ),
        )
        for name, value, ok, allowed in checks:
            if not ok:
                raise ValueError(f"config.json: {name} = {value!r} is not supported: {allowed}")

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Width of the cached row of one token and layer: the latent and the rotated key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        return layer >= self.first_k_dense_replace

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Full module name -> (out, in) of every linear that LoRA can adapt, routed experts apart."""
        shapes: dict[str, tuple[int, int]] = {"lm_head": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            shapes.update(self._attention_shapes(f"{prefix}.self_attn"))
            mlp, width = f"{prefix}.mlp", self.intermediate_size
            if self.is_moe_layer(layer):
                mlp, width = f"{prefix}.mlp.shared_experts", self.moe_intermediate_size * self.n_shared_experts
            if width:
                shapes[f"{mlp}.gate_proj"] = shapes[f"{mlp}.up_proj"] = (width, self.hidden_size)
                shapes[f"{mlp}.down_proj"] = (self.hidden_size, width)
        return shapes

    def _attention_shapes(self, prefix: str) -> dict[str, tuple[int, int]]:
        heads = self.num_attention_heads
        shapes = {
            f"{prefix}.kv_a_proj_with_mqa": (self.latent_width, self.hidden_size),
            f"{prefix}.kv_b_proj": (heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank),
            f"{prefix}.o_proj": (self.hidden_size, heads * self.v_head_dim),
        }
        if self.q_lora_rank is None:
            shapes[f"{prefix}.q_proj"] = (heads * self.qk_head_dim, self.hidden_size)
        else:
            shapes[f"{prefix}.q_a_proj"] = (self.q_lora_rank, self.hidden_size)
            shapes[f"{prefix}.q_b_proj"] = (heads * self.qk_head_dim, self.q_lora_rank)
        return shapes

    def adapter_targets(self) -> AdapterTargets:
        """What an adapter file may adapt on this base."""
        shape = ExpertShape(self.n_routed_experts, self.hidden_size, self.moe_intermediate_size)
        experts = {layer: shape for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)}
        return AdapterTargets(self.linear_shapes(), experts, self.num_hidden_layers, self.model_type)


# What transformers takes for a key that config.json leaves out; Kimi's files are complete, so nothing is assumed there.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "deepseek_v2": {
        "q_lora_rank": 1536, "n_shared_experts": 2, "first_k_dense_replace": 0, "n_group": None, "topk_group": None,
        "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    },
    "kimi_k2": {},
}  # fmt: skip
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_routed_experts",
    "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip
_FAMILY_KEYS = tuple(_FAMILY_DEFAULTS["deepseek_v3"])
# Keys of which one value is implemented; another would change the maths.
_ONLY_VALUES = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip


def _fields(raw: Mapping[str, Any], model_dir: Path) -> dict[str, Any]:
    """The constructor's arguments from config.json; raises ValueError naming keys that are missing or wrong."""
    path = model_dir / "config.json"
    model_type = str(raw.get("model_type", ""))
    family = _FAMILY_DEFAULTS.get(model_type, {}) | {key: raw[key] for key in _FAMILY_KEYS if key in raw}
    missing = [key for key in _COUNTS if raw.get(key) is None] + [key for key in _FAMILY_KEYS if key not in family]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: is this a DeepSeek MoE model?")
    for key, only in _ONLY_VALUES.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported: {only!r} only")
    is_v2 = model_type == "deepseek_v2"
    counts = {key: _count(raw[key], 1, f"{path}: {key}") for key in _COUNTS}
    return counts | {
        "model_type": model_type,
        "q_lora_rank": family["q_lora_rank"] and _count(family["q_lora_rank"], 1, f"{path}: q_lora_rank"),
        "n_shared_experts": _count(family["n_shared_experts"] or 0, 0, f"{path}: n_shared_experts"),
        "first_k_dense_replace": _count(family["first_k_dense_replace"], 0, f"{path}: first_k_dense_replace"),
        "n_group": _count(family["n_group"] or 1, 1, f"{path}: n_group"),
        "topk_group": _count(family["topk_group"] or 1, 1, f"{path}: topk_group"),
        "scoring_func": raw.get("scoring_func") or ("softmax" if is_v2 else "sigmoid"),
        "topk_method": raw.get("topk_method") or ("greedy" if is_v2 else "noaux_tc"),
        "norm_topk_prob": bool(family["norm_topk_prob"]),
        "routed_scaling_factor": _number(family["routed_scaling_factor"], f"{path}: routed_scaling_factor"),
        "rms_norm_eps": _number(raw.get("rms_norm_eps", 1e-6), f"{path}: rms_norm_eps"),
        "rope_theta": float(raw["rope_theta"]),
        "yarn": _yarn(raw.get("rope_scaling"), path),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "stored_dtype": raw.get("torch_dtype") or raw.get("dtype"),
    }


def _count(value: object, least: int, where: str) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{where} = {value!r} must be a whole number, {least} or more")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{where} = {value!r} must be a positive number")
    return float(value)


def _yarn(scaling: Mapping[str, Any] | None, path: Path) -> YarnScaling | None:
    if scaling is None or scaling["rope_type"] == "default":
        return None
    if scaling["rope_type"] != "yarn":
        raise ValueError(f"{path}: rope type {scaling['rope_type']!r} is not supported: yarn only")
    given = {key: value for key, value in scaling.items() if value is not None and key not in ("rope_type", "type")}
    if given.pop("truncate", True) is not True or given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: unsupported YaRN values in {dict(scaling)}")
    known = {field.name for field in fields(YarnScaling)}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{path}: unsupported YaRN keys {', '.join(unknown)}")
    if missing := sorted({"factor", "original_max_position_embeddings"} - given.keys()):
        raise ValueError(f"{path}: YaRN lacks {', '.join(missing)}")
    return YarnScaling(**{key: _number(value, f"{path}: rope_scaling.{key}") for key, value in given.items()})
