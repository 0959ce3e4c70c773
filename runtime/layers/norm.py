"""Root-mean-square norm."""

from __future__ import annotations

from torch import Tensor, nn

from runtime.layers.placement import Placement


class RmsNorm(nn.Module):
    """Norm over the last axis with a learnt weight."""

    def __init__(self, width: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.eps = eps
        self.ops = placement.ops
        self.weight = placement.empty(width)

    def forward(self, x_TN: Tensor) -> Tensor:
        """[T, N] -> [T, N] in the input's dtype."""
        return self.ops.rms_norm(x_TN, self.weight, self.eps)

    def add(self, x_TN: Tensor, residual_TN: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of residual + x, that sum), [T, N] each; no residual counts as zeros."""
        if residual_TN is None:
            return self(x_TN), x_TN
        return self.ops.add_rms_norm(x_TN, residual_TN, self.weight, self.eps)
