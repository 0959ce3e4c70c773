"""The frozen root-mean-square norm: its gradient by hand, which keeps one number a row instead of several copies."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from runtime.layers.norm import RmsNorm


def frozen_rms_norm(x_TN: Tensor, norm: RmsNorm) -> Tensor:
    """`norm(x)`, [T, N], with a gradient for x alone."""
    return cast(Tensor, _FrozenRmsNorm.apply(x_TN, norm))  # type: ignore[no-untyped-call]


class _FrozenRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, norm: RmsNorm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x_TN)
        y_TN: Tensor = norm(x_TN)
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (x_TN,) = ctx.saved_tensors
        x = x_TN.float()
        scale = torch.rsqrt(torch.linalg.vecdot(x, x)[:, None] / x.shape[1] + ctx.norm.eps)
        scaled_grad = grads[0].float() * ctx.norm.weight.float()
        mean = torch.linalg.vecdot(scaled_grad, x)[:, None] / x.shape[1]
        return scaled_grad.sub_(x.mul_(mean * scale * scale)).mul_(scale).to(x_TN.dtype), None
