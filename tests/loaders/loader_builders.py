"""Tiny random models and adapters for the loader tests, written by transformers, PEFT and safetensors."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loaders.adapter import AdapterTargets, AdapterWeights, ExpertShape, LoraPair
from loaders.base import TensorSpec

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, VOCAB = 48, 16, 4, 3, 96
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
}
PREFIX = "base_model.model."


def make_model(**overrides: Any) -> Any:
    """A DeepseekV3ForCausalLM of transformers with three layers, the first dense, in fp32 with fixed random weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 80,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_shared_experts": 1,
        "n_routed_experts": EXPERTS,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "qk_nope_head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 5120,
        "rope_parameters": {"rope_theta": 10000.0, **YARN},
    }
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings | overrides)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    return model


def read_all(model_dir: Path) -> dict[str, Tensor]:
    """Every tensor of a directory by name, read by the safetensors library."""
    return {name: t for path in sorted(model_dir.glob("*.safetensors")) for name, t in load_file(path).items()}


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """What a model with these tensors expects of its files."""
    return {name: TensorSpec(tuple(t.shape), name.endswith("e_score_correction_bias")) for name, t in tensors.items()}


def targets_of(tensors: Mapping[str, Tensor]) -> AdapterTargets:
    """What a model with these tensors (disk names) offers to adapters."""
    linears: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        is_linear = name.endswith(("_proj.weight", "_mqa.weight")) or name == "lm_head.weight"
        if is_linear and ".mlp.experts." not in name:
            linears[name.removesuffix(".weight")] = (tensor.shape[0], tensor.shape[1])
    experts = {layer: ExpertShape(EXPERTS, HIDDEN, INTERMEDIATE) for layer in range(1, LAYERS)}
    return AdapterTargets(linears, experts, LAYERS)


@dataclass(frozen=True)
class TinyModel:
    """A saved model: its directory, its tensors by disk name, and what is expected of and offered by them."""

    path: Path
    tensors: dict[str, Tensor]
    expected: dict[str, TensorSpec]
    targets: AdapterTargets


def save_tiny(path: Path) -> TinyModel:
    """The tiny model as transformers saves it, in several shards."""
    make_model().save_pretrained(path, max_shard_size="60KB")
    tensors = read_all(path)
    return TinyModel(path, tensors, specs_of(tensors), targets_of(tensors))


def write_model(path: Path, shards: list[dict[str, Tensor]], config: Mapping[str, Any] | None = None) -> Path:
    """Write shards with an index (or model.safetensors when there is one), and config.json."""
    path.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors")
    else:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, path / name)
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(dict(config or {})))
    return path


def write_adapter(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Write an adapter directory with an ordinary PEFT config changed by `config`."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "adapter_model.safetensors")
    settings: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings | config))
    return path


def factors(module: str, out_features: int, in_features: int, lora_rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random lora_A and lora_B of one module under their PEFT keys."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(lora_rank, in_features, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out_features, lora_rank, generator=generator),
    }


def expert_factors(layer: int, expert: int, lora_rank: int = 4) -> dict[str, Tensor]:
    """Random per-expert 2-D factors of all three projections."""
    module, seed = f"model.layers.{layer}.mlp.experts.{expert}", 100 * layer + 3 * expert
    return {
        **factors(f"{module}.gate_proj", INTERMEDIATE, HIDDEN, lora_rank, seed),
        **factors(f"{module}.up_proj", INTERMEDIATE, HIDDEN, lora_rank, seed + 1),
        **factors(f"{module}.down_proj", HIDDEN, INTERMEDIATE, lora_rank, seed + 2),
    }


def peft_model(**lora_config: Any) -> Any:
    """The tiny model with a PEFT adapter whose lora_A and lora_B are random, none zero."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make_model(), LoraConfig(**lora_config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_peft(model: Any, path: Path) -> Path:
    """Save the adapter as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def merged_deltas(model: Any, tiny_tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """PEFT's own merge minus the base, by disk name, where they differ. Uses the model up."""
    model.merge_and_unload().save_pretrained(path)
    merged = read_all(path)
    assert merged.keys() == tiny_tensors.keys()
    return {name: merged[name] - t for name, t in tiny_tensors.items() if not torch.equal(merged[name], t)}


def delta(pair: LoraPair) -> Tensor:
    """scale * B @ A."""
    return pair.scale * (pair.b.float() @ pair.a.float())


def our_deltas(weights: AdapterWeights) -> dict[str, Tensor]:
    """The weight changes an adapter means, by disk name."""
    result = {f"{module}.weight": delta(pair) for module, pair in weights.linears.items()}
    for layer, experts in weights.experts.items():
        for expert, lora in experts.items():
            for kind in ("gate", "up", "down"):
                pair = getattr(lora, kind)
                if pair is not None:
                    result[f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"] = delta(pair)
    return result


def assert_same_deltas(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal names and values."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
