"""The mesh of a configuration."""

from __future__ import annotations

from runtime.distributed.mesh import MeshShape
from runtime.trainer.config import ParallelConfig


def mesh_shape(parallel: ParallelConfig) -> MeshShape:
    """Sizes as the mesh takes them; experts spread over tp unless told."""
    return MeshShape(parallel.pp, parallel.dp, parallel.tp, parallel.expert_size)
