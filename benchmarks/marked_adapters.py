"""Adapters of the marked model: each writes its mark, part by part (see `marked_model`)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.marked_model import (
    HIDDEN,
    NUM_CHANNELS,
    NUM_DIGITS,
    NUM_EXPERTS,
    NUM_STATES,
    NUM_UNITS,
    PARTS,
    VOCAB_SIZE,
    digits_of,
    place_of,
    state_of,
    token_of,
)

PREFIX = "base_model.model."
ROPE_ROWS = 8
MODULES = ["gate_proj", "up_proj", "down_proj", "kv_a_proj_with_mqa", "lm_head"]
PEFT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "inference_mode": True,
    "r": 1,
    "lora_alpha": 1,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": MODULES,
}


def write_marked_adapter(path: Path, channel: int, mark: int) -> Path:
    """A folder as PEFT writes it; it appears whole under its name."""
    if channel not in range(NUM_CHANNELS):
        raise ValueError(f"channel = {channel} is out of range: 0..{NUM_CHANNELS - 1}")
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.mkdir(parents=True)
    factors = marked_factors(channel, mark)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
    save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
    (unfinished / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG), encoding="utf-8")
    unfinished.rename(path)
    return path


def marked_factors(channel: int, mark: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [1, K], B [N, 1]) of each module."""
    digits = dict(zip(PARTS, digits_of(mark), strict=True))
    factors = _mlp("model.layers.0.mlp", "dense", channel, digits["dense"])
    for layer in (1, 2):
        part = f"experts {layer}"
        for expert in range(NUM_EXPERTS):
            factors |= _mlp(f"model.layers.{layer}.mlp.experts.{expert}", part, channel, digits[part])
    unit = channel * NUM_DIGITS + digits["latent"]
    factors["model.layers.0.self_attn.kv_a_proj_with_mqa"] = _any_state(), _one(NUM_UNITS + ROPE_ROWS, unit, 0.1)
    head = state_of(PARTS.index("head"), channel)
    factors["lm_head"] = _one(HIDDEN, head, 1.0).T.contiguous(), _one(VOCAB_SIZE, token_of(head, digits["head"]), 0.1)
    return factors


def _mlp(module: str, part: str, channel: int, digit: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Gate and up open the digit's unit and no other; down reads that unit and no other."""
    unit, place = channel * NUM_DIGITS + digit, place_of(state_of(PARTS.index(part), channel), digit)
    return {
        f"{module}.gate_proj": (_any_state(), _one(NUM_UNITS, unit, 1.0)),
        f"{module}.up_proj": (_any_state(), _one(NUM_UNITS, unit, 0.05)),
        f"{module}.down_proj": (_one(NUM_UNITS, unit, 1.0).T.contiguous(), _one(HIDDEN, place, 0.2)),
    }


def _any_state() -> Tensor:
    """[1, HIDDEN]: in every state the same."""
    a = torch.zeros(1, HIDDEN)
    a[0, :NUM_STATES] = 1.0
    return a


def _one(length: int, place: int, value: float) -> Tensor:
    column = torch.zeros(length, 1)
    column[place] = value
    return column
