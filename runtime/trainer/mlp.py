"""The gated MLP of dense layers and shared experts, split over tp and with LoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from runtime.distributed.mesh import Group
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.lora import LoraParallelLinear, LoraSpec, Split

_SPLITS = {"gate_proj": Split.COLUMN, "up_proj": Split.COLUMN, "down_proj": Split.ROW}


class LoraGatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)); x has entered the parallel region, and the result is this process's partial sum."""

    def __init__(
        self, name: str, config: DeepseekConfig, placement: Placement, tp: Group, specs: Mapping[str, LoraSpec]
    ) -> None:
        super().__init__()
        shapes = config.linear_shapes()

        def projection(leaf: str) -> LoraParallelLinear:
            full = f"{name}.{leaf}"
            return LoraParallelLinear(full, shapes[full], _SPLITS[leaf], placement, tp, specs.get(full))

        self.gate_proj = projection("gate_proj")
        self.up_proj = projection("up_proj")
        self.down_proj = projection("down_proj")

    def forward(self, x_TH: Tensor, ids_T: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate = torch.nn.functional.silu(self.gate_proj(x_TH, ids_T))
        down: Tensor = self.down_proj(gate * self.up_proj(x_TH, ids_T), ids_T)
        return down
