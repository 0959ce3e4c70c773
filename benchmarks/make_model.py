"""Make a DeepSeek-V3-shaped base of 0.79 B random parameters and eight rank-16 adapters on all of its routed experts.

    python -m benchmarks.make_model [--out DIR] [--tiny]

Every tensor is drawn from a seed derived from its name, so the files are the same wherever and in whatever order they
are made. Shards are written one layer at a time: memory stays at one layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

NUM_ADAPTERS = 8
LORA_RANK = 16
LORA_ALPHA = 16
DEFAULT_OUT = Path(__file__).parent / "models"
DONE = "done"

FULL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "moe_layer_freq": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TINY: dict[str, Any] = FULL | {
    "torch_dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def base_dir(out: Path) -> Path:
    """Where the base lies."""
    return out / "base"


def adapter_dir(out: Path, index: int, form: str) -> Path:
    """Where an adapter lies; `form` is "per-expert" (2-D keys) or "peft" (PEFT's own for fused experts)."""
    return out / f"adapter-{index}-{form}"


def make_all(out: Path, config: dict[str, Any]) -> None:
    """Write the base and the adapters under `out`, unless an earlier run with the same settings finished."""
    stamp = out / DONE
    settings = json.dumps(config, sort_keys=True)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == settings:
        return
    write_base(base_dir(out), config)
    for index in range(NUM_ADAPTERS):
        write_adapter(out, index, config)
    stamp.write_text(settings, encoding="utf-8")


def write_base(path: Path, config: dict[str, Any]) -> None:
    """Write the base, one shard per layer and one for the rest."""
    path.mkdir(parents=True, exist_ok=True)
    weight_map, num_bytes = {}, 0
    layers = range(config["num_hidden_layers"])
    names = [f"model-{index + 1:05d}-of-{len(layers) + 1:05d}.safetensors" for index in range(len(layers) + 1)]
    for name, shapes in zip(names, [_outer_shapes(config), *(_layer_shapes(config, n) for n in layers)], strict=True):
        tensors = {key: _draw(key, shape, getattr(torch, config["torch_dtype"])) for key, shape in shapes}
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    print(f"base: {num_parameters(config) / 1e9:.3f} B parameters, {num_bytes / 1e9:.2f} GB")


def num_parameters(config: dict[str, Any]) -> int:
    """Parameters of the base, from its shapes."""
    layers = (_layer_shapes(config, layer) for layer in range(config["num_hidden_layers"]))
    return sum(math.prod(shape) for _, shape in itertools.chain(_outer_shapes(config), *layers))


def write_adapter(out: Path, index: int, config: dict[str, Any]) -> None:
    """Write one adapter in both forms, with equal weights.

    Gate and up share their A, as in adapters that PEFT trains on fused experts: so PEFT can hold it at rank 16 and
    does not pay for a block-diagonal rank 32.
    """
    per_expert: dict[str, Tensor] = {}
    fused: dict[str, Tensor] = {}
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts"
        factors = [_expert_factors(f"{index}.{layer}.{expert}", config) for expert in range(config["n_routed_experts"])]
        for expert, (a_in, b_gate, b_up, a_down, b_down) in enumerate(factors):
            for module, lora_a, lora_b in (("gate", a_in, b_gate), ("up", a_in, b_up), ("down", a_down, b_down)):
                per_expert[f"{prefix}.{expert}.{module}_proj.lora_A.weight"] = lora_a.clone()
                per_expert[f"{prefix}.{expert}.{module}_proj.lora_B.weight"] = lora_b
        a_in, b_gate, b_up, a_down, b_down = (torch.stack(part) for part in zip(*factors, strict=True))
        fused[f"{prefix}.base_layer.lora_A.weight"] = a_in.flatten(0, 1)
        fused[f"{prefix}.base_layer.lora_B.weight"] = _rank_major(torch.cat((b_gate, b_up), dim=1))
        fused[f"{prefix}.lora_A.weight"] = a_down.flatten(0, 1)
        fused[f"{prefix}.lora_B.weight"] = _rank_major(b_down)
    _save_adapter(adapter_dir(out, index, "per-expert"), per_expert, ["gate_proj", "up_proj", "down_proj"], None)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    _save_adapter(adapter_dir(out, index, "peft"), fused, [], parameters)
    print(f"adapter {index}: {sum(tensor.nbytes for tensor in per_expert.values()) / 1e6:.1f} MB per-expert")


def _rank_major(lora_b: Tensor) -> Tensor:
    """[experts, out, rank] -> [out, rank * experts], the expert index fastest, as PEFT 0.19 and later store it."""
    return lora_b.permute(1, 2, 0).flatten(1).contiguous()


def _expert_factors(seed: str, config: dict[str, Any]) -> tuple[Tensor, ...]:
    """A of gate and up, B of gate, B of up, A of down, B of down; B is not zero, as after training."""
    hidden, inner, dtype = config["hidden_size"], config["moe_intermediate_size"], getattr(torch, config["torch_dtype"])
    shapes = (LORA_RANK, hidden), (inner, LORA_RANK), (inner, LORA_RANK), (LORA_RANK, inner), (hidden, LORA_RANK)
    return tuple(
        _draw(f"adapter.{seed}.{number}", shape, dtype, gain=gain)
        for number, (shape, gain) in enumerate(zip(shapes, (1.0, 0.3, 0.3, 1.0, 0.3), strict=True))
    )


def _save_adapter(path: Path, tensors: dict[str, Tensor], modules: list[str], parameters: list[str] | None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "peft_version": "0.21.2",
        "target_modules": modules,
        "target_parameters": parameters,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _outer_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (config["vocab_size"], config["hidden_size"])
    yield "model.norm.weight", (config["hidden_size"],)
    yield "lm_head.weight", (config["vocab_size"], config["hidden_size"])


def _layer_shapes(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, q_rank, kv_rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    prefix = f"model.layers.{layer}"
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield f"{prefix}.self_attn.q_a_proj.weight", (q_rank, hidden)
    yield f"{prefix}.self_attn.q_a_layernorm.weight", (q_rank,)
    yield f"{prefix}.self_attn.q_b_proj.weight", (heads * (nope + rope), q_rank)
    yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
    yield f"{prefix}.self_attn.kv_a_layernorm.weight", (kv_rank,)
    yield f"{prefix}.self_attn.kv_b_proj.weight", (heads * (nope + value), kv_rank)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * value)
    if layer < config["first_k_dense_replace"]:
        yield from _mlp_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
        return
    inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    yield f"{prefix}.mlp.gate.weight", (experts, hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (experts,)
    yield from _mlp_shapes(f"{prefix}.mlp.shared_experts", hidden, inner * config["n_shared_experts"])
    for expert in range(experts):
        yield from _mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, inner)


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, gain: float = 1.0) -> Tensor:
    """Normal values of a size that keeps activations near one; norms are ones, the correction bias is small."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("e_score_correction_bias"):
        return torch.randn(shape, generator=generator) * 0.02
    scale = 1.0 if name.endswith("embed_tokens.weight") else gain * shape[-1] ** -0.5
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--tiny", action="store_true", help="a model of a few hundred kilobytes, to try the scripts")
    arguments = parser.parse_args()
    make_all(arguments.out / ("tiny" if arguments.tiny else "full"), TINY if arguments.tiny else FULL)


if __name__ == "__main__":
    main()
