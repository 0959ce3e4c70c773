"""What each trainable factor declares of itself: its global name, what of it lies here, and who holds the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from runtime.distributed.mesh import Group, Mesh


class Side(StrEnum):
    """The two factors of delta W = scale x B A."""

    A = "lora_A"
    B = "lora_B"


@dataclass(frozen=True)
class LoraParameter:
    """One factor: `tensor` holds this process's part of it, float32.

    `shape` is the full one, [r, in] or [out, r], of one expert where `experts` lists the global indices of the
    experts in dimension 0 of `tensor`. `shard_dim`: split over tp along that dimension of `shape`.
    `is_partial`: the gradient here counts only this tp process's part of the module.
    """

    name: str
    side: Side
    tensor: nn.Parameter
    shape: tuple[int, int]
    scale: float
    shard_dim: int | None = None
    is_partial: bool = False
    experts: tuple[int, ...] | None = None

    def replicas(self, mesh: Mesh) -> Group:
        """The processes that hold the same values: their gradients are summed, and they must never differ."""
        if self.experts is not None:
            return mesh.expert_replicas
        return mesh.stage if self.shard_dim is None else mesh.dp

    def gradient_weight(self, mesh: Mesh) -> float:
        """What the gradient counts in the sum over the replicas: a complete one is there on every tp process."""
        is_repeated = self.experts is None and self.shard_dim is None and not self.is_partial
        return 1.0 / mesh.tp.size if is_repeated else 1.0

    def expert_name(self, expert: int) -> str:
        """The name of one expert's factor, from which its initial values follow."""
        module, _, leaf = self.name.rpartition(".")
        return f"{module}.{expert}.{leaf}"


def shard(full: Tensor, dim: int | None, group: Group) -> Tensor:
    """This process's part of a full tensor."""
    return full if dim is None else full.chunk(group.size, dim)[group.rank]


def num_elements(parameters: Iterable[LoraParameter]) -> int:
    """Elements held by this process."""
    return sum(parameter.tensor.numel() for parameter in parameters)
