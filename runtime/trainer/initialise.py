"""Broadcast initialisation: full-size factors are drawn on one process and sent to all that hold a part of them.

The seed of a factor is the first 8 bytes of sha256("SEED:NAME"), with the run's seed and the factor's global name (for
routed experts with the expert's global index), so values depend neither on the layout nor on the order of drawing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed.mesh import Group, Mesh
from runtime.trainer.parameters import LoraParameter, Side

FullFactor = Callable[[str, tuple[int, int]], Tensor]
"""(name, shape) -> the full factor in float32."""


def initialise(parameters: Sequence[LoraParameter], mesh: Mesh, init: str, seed: int) -> None:
    """Draw A and send it; B stays zero. Every process of a stage calls this with the same parameters in order."""
    for parameter in parameters:
        if parameter.side is Side.A:
            distribute(parameter, mesh, lambda name, shape: draw(name, shape, init, seed))


def distribute(parameter: LoraParameter, mesh: Mesh, full_of: FullFactor) -> None:
    """Send a factor from the stage's first process, which alone calls `full_of(name, shape)`, to all that hold it."""
    if parameter.experts is not None:
        _distribute_experts(parameter, mesh, full_of)
        return
    is_source = mesh.stage.rank == 0
    full = full_of(parameter.name, parameter.shape) if is_source else None
    with torch.no_grad():
        if parameter.shard_dim is None:
            if full is not None:
                parameter.tensor.copy_(full)
            send_to_all(parameter.tensor.data, mesh.stage)
            return
        if mesh.dp.rank == 0:
            parts = None
            if full is not None:
                parts = [part.contiguous() for part in full.chunk(mesh.tp.size, parameter.shard_dim)]
            _scatter(parameter.tensor.data, parts, mesh.tp)
        send_to_all(parameter.tensor.data, mesh.dp)


def _distribute_experts(parameter: LoraParameter, mesh: Mesh, full_of: FullFactor) -> None:
    """Expert by expert over the stage's first whole set of experts, then to the other sets."""
    tensor = parameter.tensor.data
    holders = _gather_experts(parameter.experts or (), mesh)
    is_first_set = mesh.stage.rank < mesh.ep.size
    with torch.no_grad():
        for ep_rank, experts in enumerate(holders):
            if not is_first_set or not experts:
                continue
            shape = (len(experts), *parameter.shape)
            drawn = None
            if mesh.ep.rank == 0:
                factors = [full_of(parameter.expert_name(expert), parameter.shape) for expert in experts]
                drawn = torch.stack(factors).to(tensor)
            if ep_rank == 0:
                if drawn is not None:
                    tensor.copy_(drawn)
            elif mesh.ep.rank == 0 and drawn is not None:
                dist.send(drawn, mesh.ep.ranks[ep_rank], group=mesh.ep.handle)
            elif mesh.ep.rank == ep_rank:
                received = tensor.new_empty(shape)
                dist.recv(received, mesh.ep.ranks[0], group=mesh.ep.handle)
                tensor.copy_(received)
        if tensor.numel():
            send_to_all(tensor, mesh.expert_replicas)


def _gather_experts(experts: tuple[int, ...], mesh: Mesh) -> list[tuple[int, ...]]:
    if mesh.ep.handle is None:
        return [experts]
    gathered: list[tuple[int, ...]] = [()] * mesh.ep.size
    dist.all_gather_object(gathered, experts, group=mesh.ep.handle)
    return gathered


def draw(name: str, shape: tuple[int, int], init: str, seed: int) -> Tensor:
    """A factor [r, in] in float32 on the CPU.

    kaiming: uniform within 1 / sqrt(in), PEFT's default (He et al. 2015 with a = sqrt 5). gaussian: normal of standard
    deviation 1 / r. xavier: uniform within sqrt(6 / (in + r)) (Glorot and Bengio 2010).
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    rank, fan_in = shape
    if init == "gaussian":
        return torch.randn(shape, generator=generator) / rank
    bound = 1 / math.sqrt(fan_in) if init == "kaiming" else math.sqrt(6 / (fan_in + rank))
    return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def send_to_all(tensor: Tensor, group: Group) -> None:
    """Overwrite the tensor on all processes of the group with that of its first one."""
    if group.handle is not None:
        dist.broadcast(tensor, group.ranks[0], group=group.handle)


def _scatter(tensor: Tensor, parts: list[Tensor] | None, group: Group) -> None:
    if group.handle is not None:
        on_device = None if parts is None else [part.to(tensor) for part in parts]
        dist.scatter(tensor, on_device, src=group.ranks[0], group=group.handle)
    elif parts is not None:
        tensor.copy_(parts[0])
