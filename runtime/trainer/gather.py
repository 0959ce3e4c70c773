"""The whole adapter on one process: factors gathered from all stages, shards and experts, as plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from loaders.adapter_types import ExpertLora, LoraPair
from runtime.distributed.mesh import Mesh, gather_objects
from runtime.trainer.parameters import LoraParameter, Side

_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)\.(\d+)\.(lora_[AB])$")


@dataclass(frozen=True)
class Adapter:
    """An adapter as the loaders describe it: linears by disk name, experts by layer and index; scales not folded."""

    linears: Mapping[str, LoraPair]
    experts: Mapping[int, Mapping[int, ExpertLora]]


@dataclass(frozen=True)
class _Piece:
    """One factor, or a part of it, that a process sends."""

    name: str
    shape: tuple[int, ...]
    scale: float
    shard: int
    shard_dim: int | None


def gather_adapter(parameters: Sequence[LoraParameter], mesh: Mesh) -> Adapter | None:
    """Collect every factor once, in float32 on the CPU of process 0; None on the others."""
    own = [pair for parameter in parameters for pair in _pieces(parameter, mesh)]
    everyone = cast(list[list[_Piece]], gather_objects([piece for piece, _ in own], mesh.world))
    if mesh.world.rank != 0:
        for _, tensor in own:
            dist.send(tensor.contiguous().cpu(), 0, group=mesh.world.handle)
        return None
    parts: dict[str, list[tuple[_Piece, Tensor]]] = {}
    for sender, pieces in enumerate(everyone):
        for index, piece in enumerate(pieces):
            tensor = own[index][1] if sender == 0 else torch.empty(piece.shape)
            if sender != 0:
                dist.recv(tensor, sender, group=mesh.world.handle)
            parts.setdefault(piece.name, []).append((piece, tensor.detach().float().cpu()))
    return as_adapter(*_joined(parts))


def as_adapter(factors: Mapping[str, Tensor], scales: Mapping[str, float]) -> Adapter:
    """Full factors by global name (one name for each expert) -> adapter; gate and up of an expert share one A."""
    linears: dict[str, LoraPair] = {}
    experts: dict[int, dict[int, dict[str, Tensor]]] = {}
    scale_of_layer: dict[int, float] = {}
    for name, tensor in factors.items():
        found = _EXPERTS.match(name)
        if found is not None:
            layer, projection, expert, side = int(found[1]), found[2], int(found[3]), found[4]
            experts.setdefault(layer, {}).setdefault(expert, {})[f"{projection}.{side}"] = tensor
            scale_of_layer[layer] = scales[name]
        elif name.endswith(Side.A):
            module = name.rpartition(".")[0]
            linears[module] = LoraPair(tensor, factors[f"{module}.{Side.B}"], scales[name])
    return Adapter(
        linears,
        {
            layer: {expert: _expert(own, scale_of_layer[layer]) for expert, own in sorted(by_expert.items())}
            for layer, by_expert in sorted(experts.items())
        },
    )


def _expert(factors: Mapping[str, Tensor], scale: float) -> ExpertLora:
    shared_a = factors[f"gate_up_proj.{Side.A}"]
    gate_b, up_b = factors[f"gate_up_proj.{Side.B}"].chunk(2)
    down = LoraPair(factors[f"down_proj.{Side.A}"], factors[f"down_proj.{Side.B}"], scale)
    return ExpertLora(LoraPair(shared_a, gate_b, scale), LoraPair(shared_a, up_b, scale), down)


def _pieces(parameter: LoraParameter, mesh: Mesh) -> list[tuple[_Piece, Tensor]]:
    """What this process sends of a factor: nothing where a process before it holds the same."""
    if parameter.replicas(mesh).rank != 0:
        return []
    tensor, scale = parameter.tensor.detach(), parameter.scale
    if parameter.experts is None:
        shard = 0 if parameter.shard_dim is None else mesh.tp.rank
        return [(_Piece(parameter.name, tuple(tensor.shape), scale, shard, parameter.shard_dim), tensor)]
    return [
        (_Piece(parameter.expert_name(expert), parameter.shape, scale, 0, None), tensor[index])
        for index, expert in enumerate(parameter.experts)
    ]


def _joined(parts: Mapping[str, list[tuple[_Piece, Tensor]]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    factors, scales = {}, {}
    for name, pieces in parts.items():
        ordered = [tensor for _, tensor in sorted(pieces, key=lambda pair: pair[0].shard)]
        dim = pieces[0][0].shard_dim
        factors[name] = ordered[0] if dim is None else torch.cat(ordered, dim)
        scales[name] = pieces[0][0].scale
    return factors, scales

