"""Operation tables with one deliberate fault each."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.cpu import CpuOps


class SwappedSwiglu(CpuOps):
    """Takes the wrong half for the gate."""

    def swiglu(self, x_T2N: Tensor) -> Tensor:
        gate, up = x_T2N.chunk(2, dim=-1)
        return super().swiglu(torch.cat((up, gate), dim=-1))


class RaisingNorm(CpuOps):
    """Raises as a device does."""

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        raise RuntimeError("aclnnRmsNorm failed,\nerror code is 507015")


class DoubledGradient(CpuOps):
    """Products along the rows are twice what they should be."""

    def grouped_outer(self, x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
        return super().grouped_outer(x_MK, y_MN, counts_G) * 2
