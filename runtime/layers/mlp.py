"""The gated MLP of dense layers and of shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.layers.linear import Linear
from runtime.layers.lora_site import StepLora
from runtime.layers.placement import Placement


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, name: str, hidden: int, intermediate: int, placement: Placement) -> None:
        super().__init__()
        self.gate_proj = Linear(f"{name}.gate_proj", hidden, intermediate, placement)
        self.up_proj = Linear(f"{name}.up_proj", hidden, intermediate, placement)
        self.down_proj = Linear(f"{name}.down_proj", intermediate, hidden, placement)

    def forward(self, x_TH: Tensor, lora: StepLora | None) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate = torch.nn.functional.silu(self.gate_proj(x_TH, lora))
        down: Tensor = self.down_proj(gate * self.up_proj(x_TH, lora), lora)
        return down
