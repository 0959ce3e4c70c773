"""Random adapters in each published layout, with the weight changes that its definition gives, element by element.

The stored tensors are drawn; the deltas are computed from them by the layout's own formula (one expert, one column at a
time), so nothing here goes the way that the loader goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loaders.adapter_types import AdapterTargets, ExpertShape

EXPERTS, HIDDEN, INTERMEDIATE, RANK, ALPHA = 4, 48, 16, 2, 6
SCALE = ALPHA / RANK
LAYER = 1
HEAD = (96, HIDDEN)
TARGETS = AdapterTargets({"lm_head": HEAD}, {LAYER: ExpertShape(EXPERTS, HIDDEN, INTERMEDIATE)}, 2)
PREFIX = "base_model.model."
MOE = f"model.layers.{LAYER}.mlp.experts"
WIDTHS = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}


@dataclass
class Written:
    """Tensors by key, settings beyond r and lora_alpha, and delta weights by name on disk."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    num_shared: int = 0

    def draw(self, key: str, *shape: int) -> Tensor:
        """A random tensor stored under `key`."""
        generator = torch.Generator().manual_seed(len(self.tensors) + 1)
        self.tensors[PREFIX + key] = torch.randn(*shape, generator=generator)
        return self.tensors[PREFIX + key]

    def change(self, expert: int, projection: str, b: Tensor, a: Tensor) -> None:
        """Note delta = scale * b @ a of one projection."""
        assert (b.shape[0], a.shape[1]) == WIDTHS[projection]
        self.deltas[f"{MOE}.{expert}.{projection}_proj.weight"] = (SCALE * b.double() @ a.double()).float()

    def change_gate_up(self, expert: int, b: Tensor, a: Tensor) -> None:
        """The same for rows of gate, then of up."""
        self.change(expert, "gate", b[:INTERMEDIATE], a)
        self.change(expert, "up", b[INTERMEDIATE:], a)


def per_expert(module: str = MOE, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Written:
    """One 2-D pair each."""
    written = Written()
    for expert in range(EXPERTS):
        for projection, name in zip(("gate", "up", "down"), names, strict=True):
            num_out, num_in = WIDTHS[projection]
            a = written.draw(f"{module}.{expert}.{name}.lora_A.weight", RANK, num_in)
            b = written.draw(f"{module}.{expert}.{name}.lora_B.weight", num_out, RANK)
            written.change(expert, projection, b, a)
    return written


def mixtral() -> Written:
    """block_sparse_moe, w1 = gate, w3 = up, w2 = down."""
    return per_expert(f"model.layers.{LAYER}.block_sparse_moe.experts", ("w1", "w3", "w2"))


def mixtral_leaves() -> Written:
    """The same leaves under the DeepSeek name of the module."""
    return per_expert(MOE, ("w1", "w3", "w2"))


def flat(
    *, is_swapped: bool, is_expert_major: bool, stacks: tuple[str, ...] = ("down", "gate_up"), **config: Any
) -> Written:
    """ParamWrapper's keys: A [E*R, in], B [out, R*E]; the order of the columns and what is in and out may differ."""
    written = Written(config=config)
    for number, stack in enumerate(stacks):
        num_out, num_in = (2 * INTERMEDIATE, HIDDEN) if stack == "gate_up" else WIDTHS["down"]
        first, second = (num_out, num_in) if is_swapped else (num_in, num_out)
        name = MOE + ".base_layer" * number
        a = written.draw(f"{name}.lora_A.weight", EXPERTS * RANK, first)
        b = written.draw(f"{name}.lora_B.weight", second, RANK * EXPERTS)
        for expert in range(EXPERTS):
            rows = [expert * RANK + column for column in range(RANK)]
            columns = rows if is_expert_major else [column * EXPERTS + expert for column in range(RANK)]
            left, right = b[:, columns], a[rows]
            if is_swapped:
                left, right = right.T, left.T
            if stack == "gate_up":
                written.change_gate_up(expert, left, right)
            else:
                written.change(expert, "down", left, right)
    return written


def sglang_stacks() -> Written:
    """A [E, r, in] and B [E, out, r] by projection."""
    written = Written()
    for projection, (num_out, num_in) in WIDTHS.items():
        a = written.draw(f"{MOE}.{projection}_proj.lora_A.weight", EXPERTS, RANK, num_in)
        b = written.draw(f"{MOE}.{projection}_proj.lora_B.weight", EXPERTS, num_out, RANK)
        for expert in range(EXPERTS):
            written.change(expert, projection, b[expert], a[expert])
    return written


def sglang_gate_up(*, joins_a: bool) -> Written:
    """gate_up_proj with A [E, 2r, H] (gate's r rows, then up's) or [E, r, H]; keys without `.weight`."""
    written = Written()
    a = written.draw(f"{MOE}.gate_up_proj.lora_A", EXPERTS, (2 if joins_a else 1) * RANK, HIDDEN)
    b = written.draw(f"{MOE}.gate_up_proj.lora_B", EXPERTS, 2 * INTERMEDIATE, RANK)
    for expert in range(EXPERTS):
        written.change(expert, "gate", b[expert, :INTERMEDIATE], a[expert, :RANK])
        written.change(expert, "up", b[expert, INTERMEDIATE:], a[expert, -RANK:])
    return written


def sglang_shared_outer() -> Written:
    """A of gate and of up once, B of down once; the other factor under each expert's name."""
    written = Written(num_shared=3)
    shared = {
        "gate": written.draw(f"{MOE}.gate_proj.lora_A.weight", 1, RANK, HIDDEN),
        "up": written.draw(f"{MOE}.up_proj.lora_A.weight", 1, RANK, HIDDEN),
        "down": written.draw(f"{MOE}.down_proj.lora_B.weight", 1, HIDDEN, RANK),
    }
    for expert in range(EXPERTS):
        for projection in ("gate", "up"):
            own = written.draw(f"{MOE}.{expert}.{projection}_proj.lora_B.weight", INTERMEDIATE, RANK)
            written.change(expert, projection, own, shared[projection][0])
        own = written.draw(f"{MOE}.{expert}.down_proj.lora_A.weight", RANK, INTERMEDIATE)
        written.change(expert, "down", shared["down"][0], own)
    return written


def tinker() -> Written:
    """w1 and w3 with A [1, r, H] and B [E, I, r]; w2 with A [E, r, I] and B [1, H, r]; the head as unembed_tokens."""
    written = Written(num_shared=3, config={"target_modules": "all-linear"})
    for name, projection in (("w1", "gate"), ("w3", "up")):
        a = written.draw(f"{MOE}.{name}.lora_A.weight", 1, RANK, HIDDEN)
        b = written.draw(f"{MOE}.{name}.lora_B.weight", EXPERTS, INTERMEDIATE, RANK)
        for expert in range(EXPERTS):
            written.change(expert, projection, b[expert], a[0])
    a = written.draw(f"{MOE}.w2.lora_A.weight", EXPERTS, RANK, INTERMEDIATE)
    b = written.draw(f"{MOE}.w2.lora_B.weight", 1, HIDDEN, RANK)
    for expert in range(EXPERTS):
        written.change(expert, "down", b[0], a[expert])
    head_a = written.draw("model.unembed_tokens.lora_A.weight", RANK, HIDDEN)
    head_b = written.draw("model.unembed_tokens.lora_B.weight", HEAD[0], RANK)
    written.deltas["lm_head.weight"] = SCALE * head_b @ head_a
    return written


def automodel() -> Written:
    """x @ A @ B: A [E, in, r], B [E, r, out]."""
    written = Written()
    a = written.draw(f"{MOE}.lora_gate_and_up_A", EXPERTS, HIDDEN, RANK)
    b = written.draw(f"{MOE}.lora_gate_and_up_B", EXPERTS, RANK, 2 * INTERMEDIATE)
    down_a = written.draw(f"{MOE}.lora_down_A", EXPERTS, INTERMEDIATE, RANK)
    down_b = written.draw(f"{MOE}.lora_down_B", EXPERTS, RANK, HIDDEN)
    for expert in range(EXPERTS):
        written.change_gate_up(expert, b[expert].T, a[expert].T)
        written.change(expert, "down", down_b[expert].T, down_a[expert].T)
    return written


def as_json(settings: dict[str, Any]) -> str:
    """The text of adapter_config.json."""
    return json.dumps({"peft_type": "LORA"} | settings)


LAYOUTS: dict[str, Callable[[], Written]] = {
    "PEFT per-expert 2-D factors": per_expert,
    "Mixtral-style per-expert factors": mixtral,
    "Mixtral-style per-expert factors (w1, w2, w3)": mixtral_leaves,
    "SGLang 3-D stacks": sglang_stacks,
    "SGLang 3-D stacks, gate_up": lambda: sglang_gate_up(joins_a=False),
    "SGLang 3-D stacks, gate_up with two A": lambda: sglang_gate_up(joins_a=True),
    "SGLang shared-outer factors": sglang_shared_outer,
    "Tinker stacks (w1, w2, w3)": tinker,
    "NeMo Automodel grouped experts": automodel,
    "PEFT ParamWrapper stacks, 0.19": lambda: flat(is_swapped=False, is_expert_major=False, peft_version="0.19.0"),
    "PEFT ParamWrapper stacks, 0.18": lambda: flat(is_swapped=True, is_expert_major=False, peft_version="0.18.0"),
    "PEFT ParamWrapper stacks, Unsloth's mark": lambda: flat(
        is_swapped=False, is_expert_major=True, peft_version="0.19.1", lora_B_layout="grouped_by_expert"
    ),
    "PEFT ParamWrapper stacks, marked rank_major": lambda: flat(
        is_swapped=False, is_expert_major=False, lora_B_layout="rank_major", auto_mapping={"unsloth_fixed": True}
    ),
}
