"""A linear layer that LoRA can attach to by name."""

from __future__ import annotations

from torch import Tensor, nn

from runtime.layers.lora_site import StepLora
from runtime.layers.placement import Placement


class Linear(nn.Module):
    """y = x W^T + the step's LoRA delta; W is [out, in] as on disk. `name` is the module's full name on disk."""

    def __init__(self, name: str, in_features: int, out_features: int, placement: Placement) -> None:
        super().__init__()
        self.name = name
        self.ops = placement.ops
        self.weight = placement.empty(out_features, in_features)

    def pack_weight(self) -> None:
        """Once the weight is loaded: keep it as the device multiplies by it fastest."""
        self.weight = nn.Parameter(self.ops.pack_linear(self.weight), requires_grad=False)

    def forward(self, x_TK: Tensor, lora: StepLora | None) -> Tensor:
        """[T, in] -> [T, out]."""
        y_TN = self.ops.linear(x_TK, self.weight)
        if lora is not None:
            lora.add_linear_(self.name, y_TN, x_TK)
        return y_TN
