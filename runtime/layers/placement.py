"""Where a layer's weights live and which operations it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.ops.base import Ops


@dataclass(frozen=True)
class Placement:
    """Device, dtype and operation table shared by all layers of one model.

    `num_spare_experts`: room in each layer of routed experts, for those that adapters bring in place of the base's.
    """

    device: torch.device
    dtype: torch.dtype
    ops: Ops
    num_spare_experts: int = 0

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        """A frozen, uninitialised parameter; the loader fills it."""
        data = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return torch.nn.Parameter(data, requires_grad=False)
