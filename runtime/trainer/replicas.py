"""What replicas owe each other: equal values, proved by checksums, and gradients summed over all that have a part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed.mesh import Group, Mesh, gather_objects
from runtime.trainer.parameters import LoraParameter

MAX_BUCKET_NUMBERS = 2**24
MAX_NAMED = 5


class ReplicasDiffer(RuntimeError):
    """Processes that must hold equal factors do not; the message names factors and processes."""


def check_replicas(parameters: Sequence[LoraParameter], mesh: Mesh, step: int) -> None:
    """Compare checksums of every factor over the processes that hold it; raises ReplicasDiffer on all of them."""
    problems: list[str] = []
    for group, members in _by_replicas(parameters, mesh):
        sums_P = torch.stack([_factor_checksum(parameter.tensor) for parameter in members])
        low, high = sums_P.clone(), sums_P.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group.handle)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group.handle)
        differing = (low != high).nonzero().squeeze(1).tolist()
        sums = gather_objects([int(sums_P[index]) for index in differing], group) if differing else []
        for index, values in zip(differing, zip(*cast(list[list[int]], sums), strict=True), strict=True):
            odd = [rank for rank, value in zip(group.ranks, values, strict=True) if value != values[0]]
            problems.append(f"{members[index].name} on process {_listed(odd)} differs from process {group.ranks[0]}")
    everyone = cast(list[list[str]], gather_objects(problems, mesh.world))
    found = sorted({problem for others in everyone for problem in others})
    if found:
        named = found[:MAX_NAMED] + ([f"and {len(found) - MAX_NAMED} more"] if len(found) > MAX_NAMED else [])
        raise ReplicasDiffer(f"step {step}: replicas of the adapter differ, the run is stopped: " + "; ".join(named))


def sum_gradients(parameters: Sequence[LoraParameter], mesh: Mesh) -> None:
    """Complete every gradient, in few large sums; a factor that nothing reached counts as zeros."""
    for parameter in parameters:
        if parameter.tensor.grad is None:
            parameter.tensor.grad = torch.zeros_like(parameter.tensor)
    for group, members in _by_replicas(parameters, mesh):
        bucket: list[tuple[LoraParameter, Tensor]] = []
        for parameter in members:
            bucket.append((parameter, _gradient(parameter)))
            if sum(grad.numel() for _, grad in bucket) >= MAX_BUCKET_NUMBERS:
                _sum_bucket(bucket, group, mesh)
                bucket = []
        if bucket:
            _sum_bucket(bucket, group, mesh)


def gradient_norm(parameters: Sequence[LoraParameter], mesh: Mesh) -> float:
    """The norm over the whole adapter, every factor counted once."""
    total = torch.zeros((), dtype=torch.float64)
    if parameters:  # a pipeline stage may have nothing to train
        norms_P = torch.stack([torch.linalg.vector_norm(_gradient(parameter)) for parameter in parameters])
        sizes_P = torch.tensor([parameter.replicas(mesh).size for parameter in parameters])
        total = (norms_P.cpu().double() ** 2 / sizes_P).sum()
    if mesh.world.handle is not None:
        dist.all_reduce(total, group=mesh.world.handle)
    return math.sqrt(float(total))


def clip_gradients(parameters: Sequence[LoraParameter], norm: float, max_norm: float) -> None:
    """Scale all gradients down to `max_norm` where their norm is larger."""
    if norm > max_norm:
        for parameter in parameters:
            _gradient(parameter).mul_(max_norm / norm)


def _gradient(parameter: LoraParameter) -> Tensor:
    if parameter.tensor.grad is None:
        raise RuntimeError(f"{parameter.name} has no gradient")
    return parameter.tensor.grad


def _by_replicas(parameters: Sequence[LoraParameter], mesh: Mesh) -> list[tuple[Group, list[LoraParameter]]]:
    """Factors by their group of replicas, groups of one left out, in an order that all of a stage share."""
    groups: dict[tuple[int, ...], tuple[Group, list[LoraParameter]]] = {}
    for parameter in parameters:
        group = parameter.replicas(mesh)
        if group.handle is not None and parameter.tensor.numel():
            groups.setdefault(group.ranks, (group, []))[1].append(parameter)
    return list(groups.values())


def _sum_bucket(bucket: list[tuple[LoraParameter, Tensor]], group: Group, mesh: Mesh) -> None:
    flat = torch.cat([grad.flatten() * parameter.gradient_weight(mesh) for parameter, grad in bucket])
    dist.all_reduce(flat, group=group.handle)
    for (_, grad), part in zip(bucket, flat.split([grad.numel() for _, grad in bucket]), strict=True):
        grad.copy_(part.view_as(grad))


def _factor_checksum(tensor: Tensor) -> Tensor:
    """A sum over the bits, weighted by position: a swap or a single other bit changes it."""
    bits = tensor.detach().contiguous().view(torch.int32).flatten().to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 2 + 1
    return (bits * weights).sum().cpu()


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
