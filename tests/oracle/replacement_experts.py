"""Random ESFT adapters, in the layout of DeepSeek's ESFT, and transformers models with those experts replaced."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracle.adapters import kind_of, module_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS = ("gate", "up", "down")
Chosen = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class RandomReplacement:
    """An ESFT folder and the experts in it: (layer, expert, projection) -> weight [out, in], in its stored dtype."""

    path: Path
    weights: dict[tuple[int, int, str], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for weight in self.weights.values())


def moe_layers(base: Path) -> list[int]:
    """The layers of a checkpoint that have routed experts."""
    names = [name for name in module_shapes(base) if kind_of(name) == "routed_experts"]
    return sorted({int(name.split(".")[2]) for name in names})


def write_replacement(
    base: Path, path: Path, chosen: Chosen, *, seed: int = 0, dtype: torch.dtype = torch.float32, gain: float = 1.0
) -> RandomReplacement:
    """Draw whole weights for the chosen experts of each layer, and save them as ESFT does."""
    shapes = module_shapes(base)
    weights = {}
    for layer, experts in chosen.items():
        for expert in experts:
            for kind in PROJECTIONS:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
                drawn = torch.randn(shapes[name], generator=generator) * gain * shapes[name][1] ** -0.5
                weights[layer, expert, kind] = drawn.to(dtype)
    path.mkdir(parents=True)
    tensors = {f"model.layers.{n}.mlp.experts.{k}.{kind}_proj.weight": w for (n, k, kind), w in weights.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    experts_of = {str(layer): list(experts) for layer, experts in chosen.items()}
    config = {"experts": experts_of, "shared_experts": False, "non_expert_modules": False}
    (path / "expert_cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return RandomReplacement(path, weights)


def replace_by_hand(model: PreTrainedModel, replacement: RandomReplacement) -> PreTrainedModel:
    """A copy of the model with those experts' weights overwritten; experts are fused in memory."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for (layer, expert, kind), weight in replacement.weights.items():
            fused = changed.get_submodule(f"model.layers.{layer}.mlp.experts")
            if kind == "down":
                fused.get_parameter("down_proj")[expert].copy_(weight)
            else:
                gate, up = fused.get_parameter("gate_up_proj")[expert].chunk(2)
                (gate if kind == "gate" else up).copy_(weight)
    return changed
