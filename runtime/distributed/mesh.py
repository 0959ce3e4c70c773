"""The mesh: which processes share a layer's weights, its tokens, its experts or its stage of the pipeline.

Process ranks are laid out as [pp, dp, tp], tp fastest. Routed experts are spread over `ep` processes of one stage, a
multiple of tp: over the tp processes of one replica (they see the same tokens), or of several replicas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from runtime.ops.platform import collective_backend

T = TypeVar("T")
# What Gloo, NCCL and torch's stores say of a process that is gone, silent or out of reach, in lower case.
_LOST = re.compile(
    r"connection (was likely )?(closed|reset|refused|timed out)|closed (by peer|the connection)|broken pipe"
    r"|timed out waiting|timeout caused pair closure|(socket|connect|read|write) timeout|socket (unexpectedly )?closed"
    r"|connectfullmesh failed|no route to host|remote process exited|ncclremoteerror|communicator was aborted"
    r"|watchdog caught collective operation timeout"
)


class MetByAll(ValueError):
    """What one process met and all of them raise, so that one of them need tell it."""


@dataclass(frozen=True)
class Group:
    """Some processes by global rank, in order, and this process's place among them; `handle` None: it is alone."""

    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.ranks)


ALONE = Group((0,), 0, None)


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh. `ep` is a multiple of `tp` and divides dp x tp."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def num_processes(self) -> int:
        """Processes of the whole mesh."""
        return self.pp * self.dp * self.tp


@dataclass(frozen=True)
class Mesh:
    """The groups of this process.

    `stage`: all processes with the same layers (dp x tp). `ep`: those that hold one whole set of routed experts, in the
    order of their experts. `expert_column`: those of `ep` with the same tp rank, which exchange rows.
    `expert_replicas`: those that hold the same experts as this one.
    """

    shape: MeshShape
    world: Group
    pp: Group
    dp: Group
    tp: Group
    ep: Group
    stage: Group
    expert_column: Group
    expert_replicas: Group


def start_processes(device: torch.device, rank: int, world_size: int, timeout_seconds: float = 1800.0) -> None:
    """Join the other processes (torchrun's variables say where they meet); nothing to do for a process alone."""
    if world_size > 1:
        dist.init_process_group(
            collective_backend(device), rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
        )


def stop_processes() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(shape: MeshShape, rank: int = 0) -> Mesh:
    """Build every group; all processes call this, in the same order. Raises ValueError on a wrong process count."""
    num_started = dist.get_world_size() if dist.is_initialized() else 1
    check_process_count(shape, num_started)
    if num_started == 1:
        return Mesh(shape, *(ALONE,) * 8)
    per_stage, replicas = shape.dp * shape.tp, shape.ep // shape.tp

    def family(key: Callable[[int, int, int, int], object]) -> Group:
        return _own_group(shape, rank, key)

    return Mesh(
        shape,
        world=Group(tuple(range(num_started)), rank, dist.group.WORLD),
        pp=family(lambda r, pp, dp, tp: (dp, tp)),
        dp=family(lambda r, pp, dp, tp: (pp, tp)),
        tp=family(lambda r, pp, dp, tp: (pp, dp)),
        ep=family(lambda r, pp, dp, tp: (pp, r % per_stage // shape.ep)),
        stage=family(lambda r, pp, dp, tp: pp),
        expert_column=family(lambda r, pp, dp, tp: (pp, dp // replicas, tp)),
        expert_replicas=family(lambda r, pp, dp, tp: (pp, r % shape.ep)),
    )


def check_process_count(shape: MeshShape, num_started: int) -> None:
    """Raises MetByAll if the mesh needs another number of processes; nobody has to be joined for that."""
    if num_started != shape.num_processes:
        were = "process was" if num_started == 1 else "processes were"
        raise MetByAll(
            f"{num_started} {were} started, but pp x dp x tp = {shape.pp} x {shape.dp} x {shape.tp} needs "
            f"{shape.num_processes}: change the number of processes or `parallel` in the configuration"
        )


def _own_group(shape: MeshShape, rank: int, key: Callable[[int, int, int, int], object]) -> Group:
    """The processes whose coordinates have the same key as this one's; groups of one are not created."""
    members: dict[object, list[int]] = {}
    for other in range(shape.num_processes):
        pp, place = divmod(other, shape.dp * shape.tp)
        members.setdefault(key(other, pp, *divmod(place, shape.tp)), []).append(other)
    own = Group((rank,), 0, None)
    for ranks in members.values():
        handle = dist.new_group(list(ranks)) if len(ranks) > 1 else None
        if rank in ranks:
            own = Group(tuple(ranks), ranks.index(rank), handle)
    return own


def gather_objects(value: object, group: Group) -> list[object]:
    """Every process's value, in the group's order, on every process."""
    if group.handle is None:
        return [value]
    gathered: list[object] = [None] * group.size
    dist.all_gather_object(gathered, value, group=group.handle)
    return gathered


def together(work: Callable[[], T], group: Group) -> T:
    """The result of work that each process does alone; what fails on one is raised on all, so that none waits for it.

    Raises MetByAll with what this process met, or with what another one did and its number. A process alone raises its
    ValueError or OSError as it is.
    """
    own: ValueError | OSError | None = None
    result = None
    try:
        result = work()
    except (ValueError, OSError) as cause:
        own = cause
    problems = gather_objects(None if own is None else str(own), group)
    if own is not None:
        raise own if group.handle is None else MetByAll(str(own)) from own
    for rank, problem in zip(group.ranks, problems, strict=True):
        if problem is not None:
            raise MetByAll(f"process {rank}: {problem}")
    return cast(T, result)


def is_lost_connection(error: BaseException) -> bool:
    """Whether this is torch.distributed's way of saying that another process is gone or was never there.

    Not what else its back-ends complain of: sizes that do not fit, devices that are used twice, memory. A pipeline
    raises its own error because of such a one.
    """
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    if isinstance(error, RuntimeError) and _LOST.search(str(error).lower()):
        return True
    return error.__cause__ is not None and is_lost_connection(error.__cause__)


def barrier(group: Group) -> None:
    """Wait for all processes of the group."""
    if group.handle is not None:
        dist.barrier(group.handle)


def sum_numbers(values: Sequence[float], group: Group) -> list[float]:
    """Element by element sums over the group, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if group.handle is not None:
        dist.all_reduce(total, group=group.handle)
    return [float(value) for value in total.tolist()]
