"""Two layouts of the same routed-expert LoRA: PEFT's fused 3-D one, and one pair of 2-D factors per expert.

E experts, r rank. Fused: A is [E*r, in] with experts outermost; B is [out, r*E] with experts innermost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

PREFIX = "base_model.model.model.layers."
GATE_UP, DOWN = "experts.base_layer.", "experts."  # PEFT wraps down_proj around gate_up_proj
_FUSED_KEY = re.compile(r"layers\.(\d+)\.mlp\.experts\.(base_layer\.)?lora_([AB])\.weight$")
_EXPERT_KEY = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.lora_([AB])\.weight$")


def per_expert_a(fused: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E*r, in] -> [E, r, in]."""
    return fused.reshape(num_experts, -1, fused.shape[1])


def per_expert_b(fused: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[out, r*E] -> [E, out, r]."""
    return fused.reshape(fused.shape[0], -1, num_experts).permute(2, 0, 1)


def split_experts(
    state: Mapping[str, torch.Tensor], num_experts: int, kept: Mapping[int, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Fused factors -> one key per expert and projection; `kept` names the experts of each layer that are written.

    The gate and up halves of B are two projections that share one A, so nothing is approximated.
    """
    split = {name: tensor for name, tensor in state.items() if not _FUSED_KEY.search(name)}
    for layer, experts in kept.items():
        root = f"{PREFIX}{layer}.mlp."
        a_gate_up = per_expert_a(state[f"{root}{GATE_UP}lora_A.weight"], num_experts)
        b_gate, b_up = per_expert_b(state[f"{root}{GATE_UP}lora_B.weight"], num_experts).chunk(2, dim=1)
        a_down = per_expert_a(state[f"{root}{DOWN}lora_A.weight"], num_experts)
        b_down = per_expert_b(state[f"{root}{DOWN}lora_B.weight"], num_experts)
        for expert in experts:
            factors = {"gate": (a_gate_up, b_gate), "up": (a_gate_up, b_up), "down": (a_down, b_down)}
            for name, (a, b) in factors.items():
                key = f"{root}experts.{expert}.{name}_proj.lora_"
                split[f"{key}A.weight"] = a[expert].clone()
                split[f"{key}B.weight"] = b[expert].clone()
    return split


def is_per_expert(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the file has one key per expert."""
    return any(_EXPERT_KEY.search(name) for name in state)


def covered_experts(state: Mapping[str, torch.Tensor], num_experts: int) -> dict[int, int]:
    """How many experts of each layer an adapter touches, in either layout."""
    touched: dict[int, set[int]] = {}
    for name, tensor in state.items():
        if found := _EXPERT_KEY.search(name):
            touched.setdefault(int(found[1]), set()).add(int(found[2]))
        elif (found := _FUSED_KEY.search(name)) and found[3] == "B":
            used = per_expert_b(tensor, num_experts).abs().sum(dim=(1, 2)).nonzero().flatten()
            touched.setdefault(int(found[1]), set()).update(used.tolist())
    return {layer: len(experts) for layer, experts in sorted(touched.items())}


def join_experts(state: Mapping[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """One key per expert -> fused factors; experts that the file leaves out become zeros.

    Raises ValueError where gate and up do not share one A.
    """
    joined = {name: tensor for name, tensor in state.items() if not _EXPERT_KEY.search(name)}
    found = {tuple(match.groups()): state[name] for name in state if (match := _EXPERT_KEY.search(name))}
    for layer in sorted({key[0] for key in found}, key=int):
        parts: dict[str, list[torch.Tensor]] = {"gate_up.A": [], "gate_up.B": [], "down.A": [], "down.B": []}
        sample = next(expert for lay, expert, _, _ in found if lay == layer)
        for index in range(num_experts):
            expert = str(index) if (layer, str(index), "gate", "A") in found else sample
            keep = 1 if expert == str(index) else 0
            a_gate, a_up = found[layer, expert, "gate", "A"], found[layer, expert, "up", "A"]
            if not torch.equal(a_gate, a_up):
                raise ValueError(f"layer {layer} expert {expert}: gate and up have different lora_A")
            b_gate, b_up = found[layer, expert, "gate", "B"], found[layer, expert, "up", "B"]
            parts["gate_up.A"].append(a_gate * keep)
            parts["gate_up.B"].append(torch.cat((b_gate, b_up)) * keep)
            parts["down.A"].append(found[layer, expert, "down", "A"] * keep)
            parts["down.B"].append(found[layer, expert, "down", "B"] * keep)
        for name, where in (("gate_up", GATE_UP), ("down", DOWN)):
            key = f"{PREFIX}{layer}.mlp.{where}lora_"
            joined[f"{key}A.weight"] = torch.cat(parts[f"{name}.A"])
            joined[f"{key}B.weight"] = torch.stack(parts[f"{name}.B"], dim=-1).flatten(1)
    return joined
