"""Random bases made, saved and read back by transformers: what it computes for these files is the truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.oracle.shapes import V3, VOCAB_SIZE, Shape

# Standard deviations in units of fan_in ** -0.5; 1 where nothing is said.
_GAINS = {"lm_head.weight": 1.5, "mlp.gate.weight": 2.0}
# What goes into the first norm, and into the norm of the latent, is small, so that a wrong eps shows.
_SMALL = 0.3
_NUM_LATENT = V3.config["kv_lora_rank"]


@dataclass(frozen=True)
class Oracle:
    """A base on disk and the transformers model that was read from it, in float32."""

    shape: Shape
    path: Path
    model: PreTrainedModel

    def prompt(self, num_tokens: int, *, seed: int = 0) -> list[int]:
        """Random token ids, none of them a special one."""
        generator = torch.Generator().manual_seed(10_000 * self.shape.seed + seed)
        return torch.randint(2, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


def build_oracle(shape: Shape, path: Path) -> Oracle:
    """Save a random model of this shape as sharded safetensors with per-expert names, and read it back."""
    config = AutoConfig.for_model(shape.model_type, **_transformers_config(shape))
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    model.save_pretrained(path, max_shard_size="250KB")
    if shape.classic_rope:
        _write_config(path, _classic_config(shape))
    reread = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    if shape.disk_model_type is not None:
        _write_config(path, _read_config(path) | {"model_type": shape.disk_model_type})
    return Oracle(shape, path, reread)


@torch.no_grad()
def logits(model: nn.Module, token_ids: list[int]) -> Tensor:
    """All positions' logits [T, vocab], float32, of one sequence without a cache."""
    out: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return out.float()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights that make every part matter: uneven norms, spread router scores, a correction bias, peaked logits."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.2)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, _SMALL)
        else:
            gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
            parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
        if name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight")):
            parameter[:_NUM_LATENT] *= _SMALL
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.1)


def _transformers_config(shape: Shape) -> dict[str, Any]:
    config = {key: value for key, value in shape.config.items() if key not in ("model_type", "architectures")}
    rope = {"rope_type": "yarn", **shape.yarn} if shape.yarn else {"rope_type": "default"}
    return config | {"rope_parameters": rope | {"rope_theta": shape.rope_theta}}


def _classic_config(shape: Shape) -> dict[str, Any]:
    """config.json in the form of the published checkpoints, from before transformers 5."""
    scaling = {"type": "yarn", **shape.yarn} if shape.yarn else None
    return shape.config | {"rope_theta": shape.rope_theta, "rope_scaling": scaling, "torch_dtype": "float32"}


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config


def _write_config(path: Path, config: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
