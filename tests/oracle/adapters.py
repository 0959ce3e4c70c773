"""Random adapter files in PEFT's per-expert 2-D layout, and their change merged into a transformers model by hand."""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:  # adapters are also written where transformers is not installed
    from transformers import PreTrainedModel

    from tests.oracle.base_models import Oracle

ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
KINDS = (*ATTENTION, "dense_mlp", "shared_experts", "routed_experts", "lm_head")

_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj$")


@dataclass(frozen=True)
class AdapterRecipe:
    """What to draw. `covers` says which (layer, expert) pairs have weights; patterns follow PEFT's rule."""

    kinds: tuple[str, ...]
    lora_rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    covers: Callable[[int, int], bool] = lambda layer, expert: True
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class RandomAdapter:
    """An adapter folder and what it adds: module name on disk -> delta weight [out, in], float32."""

    path: Path
    deltas: dict[str, Tensor]
    num_tensor_elements: int


def kind_of(module: str) -> str | None:
    """The kind of a module by its name on disk; None for what takes no adapter (router, embedding, norms)."""
    leaf = module.rsplit(".", 1)[-1]
    if leaf in (*ATTENTION, "lm_head"):
        return leaf
    if _EXPERT.search(module):
        return "routed_experts"
    if ".mlp.shared_experts." in module:
        return "shared_experts"
    return "dense_mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else None


def kinds_of(oracle: Oracle) -> tuple[str, ...]:
    """The kinds that this base has."""
    present = {kind_of(module) for module in module_shapes(oracle.path)}
    return tuple(kind for kind in KINDS if kind in present)


def module_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Name on disk -> (out, in) of every two-dimensional weight of a checkpoint."""
    shapes: dict[str, tuple[int, int]] = {}
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                shape = tensors.get_slice(key).get_shape()
                if key.endswith(".weight") and len(shape) == 2:
                    shapes[key.removesuffix(".weight")] = (shape[0], shape[1])
    return shapes


def write_adapter(base: Path, path: Path, recipe: AdapterRecipe) -> RandomAdapter:
    """Draw A and B (both non-zero) for each module the recipe names, and save them as PEFT names them."""
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for module, (num_out, num_in) in module_shapes(base).items():
        if kind_of(module) not in recipe.kinds or not _covered(module, recipe):
            continue
        lora_rank = int(_by_pattern(recipe.rank_pattern, module, recipe.lora_rank))
        alpha = _by_pattern(recipe.alpha_pattern, module, recipe.alpha)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{recipe.seed}:{module}".encode()))
        lora_a = torch.randn(lora_rank, num_in, generator=generator) * num_in**-0.5
        lora_b = torch.randn(num_out, lora_rank, generator=generator) * 0.3 * lora_rank**-0.5
        lora_a, lora_b = lora_a.to(recipe.dtype), lora_b.to(recipe.dtype)
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b
        scale = alpha / (lora_rank**0.5 if recipe.use_rslora else lora_rank)
        deltas[module] = (scale * lora_b.double() @ lora_a.double()).float()
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(_config(recipe, deltas), indent=2), encoding="utf-8")
    return RandomAdapter(path, deltas, sum(tensor.numel() for tensor in tensors.values()))


def merge_by_hand(model: PreTrainedModel, deltas: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of the model with every delta added to the weight it belongs to; experts are fused in memory."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for module, delta in deltas.items():
            expert = _EXPERT.search(module)
            if expert is None:
                merged.get_parameter(f"{module}.weight").add_(delta)
                continue
            layer, index, projection = int(expert[1]), int(expert[2]), expert[3]
            fused = merged.get_submodule(f"model.layers.{layer}.mlp.experts")
            if projection == "down":
                fused.get_parameter("down_proj")[index].add_(delta)
            else:
                gate, up = fused.get_parameter("gate_up_proj")[index].chunk(2)
                (gate if projection == "gate" else up).add_(delta)
    return merged


def _covered(module: str, recipe: AdapterRecipe) -> bool:
    expert = _EXPERT.search(module)
    return expert is None or recipe.covers(int(expert[1]), int(expert[2]))


def _by_pattern(patterns: dict[str, int] | dict[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches a whole suffix of the module's name wins."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _config(recipe: AdapterRecipe, modules: Iterable[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": recipe.lora_rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": recipe.use_rslora,
        "rank_pattern": recipe.rank_pattern,
        "alpha_pattern": recipe.alpha_pattern,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
    }
