"""Checkpoints in MindSpeed-LLM's documented layout, cut for tp x pp x ep processes and saved by torch.save."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from loaders.adapter_types import AdapterTargets, ExpertShape

EXPERTS, HIDDEN, INTERMEDIATE, DENSE, RANK, ALPHA = 4, 12, 6, 10, 2, 6
LAYERS, FIRST_MOE = 4, 1
SCALE = ALPHA / RANK
Q_A, KV_A, V_OUT = 7, 9, 8
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def targets() -> AdapterTargets:
    """A base of four layers, the first one dense."""
    linears = {}
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        linears[f"{attention}.q_a_proj"] = (Q_A, HIDDEN)
        linears[f"{attention}.kv_a_proj_with_mqa"] = (KV_A, HIDDEN)
        linears[f"{attention}.o_proj"] = (HIDDEN, V_OUT)
        mlp = mlp if layer < FIRST_MOE else f"{mlp}.shared_experts"
        linears |= {f"{mlp}.gate_proj": (DENSE, HIDDEN), f"{mlp}.up_proj": (DENSE, HIDDEN)}
        linears[f"{mlp}.down_proj"] = (HIDDEN, DENSE)
    experts = {layer: ExpertShape(EXPERTS, HIDDEN, INTERMEDIATE) for layer in range(FIRST_MOE, LAYERS)}
    return AdapterTargets(linears, experts, LAYERS)


@dataclass
class Whole:
    """The factors of one process's training, x @ A @ B, before they are cut; and what they add to each weight."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, name: str, *shape: int) -> Tensor:
        """A random factor."""
        generator = torch.Generator().manual_seed(len(self.factors) + 1)
        self.factors[name] = torch.randn(*shape, generator=generator)
        return self.factors[name]

    def linear(self, name: str, num_in: int, parts: dict[str, int]) -> None:
        """A [r, in] and B [out, r] of a linear whose rows are those of several modules on disk."""
        a = self.draw(f"{name}.lora_A.default.weight", RANK, num_in)
        b = self.draw(f"{name}.lora_B.default.weight", sum(parts.values()), RANK)
        for module, rows in zip(parts, b.split(list(parts.values())), strict=True):
            self.deltas[f"{module}.weight"] = SCALE * rows @ a


def whole(*, is_grouped: bool = True) -> Whole:
    """Attention, dense and shared MLP and all experts of every layer."""
    made = Whole()
    for layer in range(LAYERS):
        disk, name = f"model.layers.{layer}", f"decoder.layers.{layer}"
        attention = f"{disk}.self_attn"
        made.linear(f"{name}.self_attention.linear_qkv", HIDDEN,
                    {f"{attention}.q_a_proj": Q_A, f"{attention}.kv_a_proj_with_mqa": KV_A})  # fmt: skip
        made.linear(f"{name}.self_attention.linear_proj", V_OUT, {f"{attention}.o_proj": HIDDEN})
        mlp = "mlp" if layer < FIRST_MOE else "mlp.shared_experts"
        halves = {f"{disk}.{mlp}.gate_proj": DENSE, f"{disk}.{mlp}.up_proj": DENSE}
        made.linear(f"{name}.{mlp}.linear_fc1", HIDDEN, halves)
        made.linear(f"{name}.{mlp}.linear_fc2", DENSE, {f"{disk}.{mlp}.down_proj": HIDDEN})
        if layer >= FIRST_MOE and is_grouped:
            _grouped(made, name, f"{disk}.mlp.experts")
        elif layer >= FIRST_MOE:
            for expert in range(EXPERTS):
                to = f"{disk}.mlp.experts.{expert}"
                local = f"{name}.mlp.experts.local_experts.{expert}"
                halves = {f"{to}.gate_proj": INTERMEDIATE, f"{to}.up_proj": INTERMEDIATE}
                made.linear(f"{local}.linear_fc1", HIDDEN, halves)
                made.linear(f"{local}.linear_fc2", INTERMEDIATE, {f"{to}.down_proj": HIDDEN})
    return made


def _grouped(made: Whole, name: str, disk: str) -> None:
    """[E, in, r] and [E, r, out], one after the other in memory."""
    a1 = made.draw(f"{name}.mlp.experts.weight1_lora_a", EXPERTS, HIDDEN, RANK)
    b1 = made.draw(f"{name}.mlp.experts.weight1_lora_b", EXPERTS, RANK, 2 * INTERMEDIATE)
    a2 = made.draw(f"{name}.mlp.experts.weight2_lora_a", EXPERTS, INTERMEDIATE, RANK)
    b2 = made.draw(f"{name}.mlp.experts.weight2_lora_b", EXPERTS, RANK, HIDDEN)
    for expert in range(EXPERTS):
        first = SCALE * (a1[expert] @ b1[expert]).T
        made.deltas[f"{disk}.{expert}.gate_proj.weight"] = first[:INTERMEDIATE]
        made.deltas[f"{disk}.{expert}.up_proj.weight"] = first[INTERMEDIATE:]
        made.deltas[f"{disk}.{expert}.down_proj.weight"] = SCALE * (a2[expert] @ b2[expert]).T


def save_shards(path: Path, made: Whole, *, tp: int = 1, stages: tuple[int, ...] = (LAYERS,), ep: int = 1) -> Path:
    """One mp_rank_* folder per process, as Megatron names them, with the file that it writes there."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "latest_checkpointed_iteration.txt").write_text("20")
    for tp_rank in range(tp):
        for stage in range(len(stages)):
            for ep_rank in range(ep):
                name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if len(stages) > 1 else "")
                folder = path / "iter_0000020" / (name + (f"_{ep_rank:03d}" if ep > 1 else ""))
                folder.mkdir(parents=True)
                own = _cut(made, (tp_rank, tp), (sum(stages[:stage]), stages[stage]), (ep_rank, ep))
                own["decoder.final_layernorm.weight"] = nn.Parameter(torch.ones(HIDDEN))
                args = argparse.Namespace(lora_r=RANK, params_dtype=torch.bfloat16, odd={1, 2})
                state = {"args": args, "checkpoint_version": 3.0, "iteration": 20, "model": own, "rng_state": [None]}
                torch.save(state, folder / "model_optim_rng.pt")
    return path


def _cut(made: Whole, tp: tuple[int, int], layers: tuple[int, int], ep: tuple[int, int]) -> OrderedDict[str, Tensor]:
    """What one process holds: layers counted from its first one, local experts, its share of rows or columns."""
    result: OrderedDict[str, Tensor] = OrderedDict()
    num_local = EXPERTS // ep[1]
    for name, factor in made.factors.items():
        parts = name.split(".")
        layer = int(parts[2]) - layers[0]
        if not 0 <= layer < layers[1]:
            continue
        parts[2] = str(layer)
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            local = int(parts[at]) - ep[0] * num_local
            if not 0 <= local < num_local:
                continue
            parts[at] = str(local)
        key = "base_model.model." + ".".join(parts)
        if factor.dim() == 3:
            result[key] = nn.Parameter(_cut_grouped(name, factor[ep[0] * num_local :][:num_local], tp))
        else:
            result[key] = nn.Parameter(_cut_linear(name, factor, tp))
    return result


def _cut_linear(name: str, factor: Tensor, tp: tuple[int, int]) -> Tensor:
    rank, size = tp
    if ".linear_fc1.lora_B" in name:
        return torch.cat([half.chunk(size)[rank] for half in factor.chunk(2)])
    if ".lora_A" in name and (".linear_fc2" in name or ".linear_proj" in name):
        return factor.chunk(size, dim=1)[rank].clone()
    return factor


def _cut_grouped(name: str, factor: Tensor, tp: tuple[int, int]) -> Tensor:
    """Cut, and give it the nominal 2-D shape of MindSpeed's parameter."""
    rank, size = tp
    if name.endswith("weight1_lora_b"):
        factor = torch.cat([half.chunk(size, dim=2)[rank] for half in factor.chunk(2, dim=2)], dim=2)
    elif name.endswith("weight2_lora_a"):
        factor = factor.chunk(size, dim=1)[rank]
    factor = factor.contiguous()
    is_wide = "weight1" in name
    return factor.view(factor.shape[1], -1) if is_wide else factor.view(-1, factor.shape[2])
