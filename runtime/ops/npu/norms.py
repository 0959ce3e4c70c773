"""Norms and the gated activation; shape suffixes as in `base.py`."""

from __future__ import annotations

import torch_npu
from torch import Tensor

from runtime.ops import reference
from runtime.ops.told import tell_once


def rms_norm(x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """`Ops.rms_norm`; differentiable."""
    if x_TN.dtype is not weight_N.dtype:
        tell_once("npu_rms_norm", f"a weight in {weight_N.dtype} for {x_TN.dtype}, where both must be the same")
        return reference.rms_norm(x_TN, weight_N, eps)
    y_TN: Tensor = torch_npu.npu_rms_norm(x_TN, weight_N, eps)[0]
    return y_TN


def add_rms_norm(x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`Ops.add_rms_norm`; the norm is of the sum before it is rounded."""
    if not x_TN.dtype == residual_TN.dtype == weight_N.dtype:
        dtypes = f"{x_TN.dtype}, {residual_TN.dtype} and {weight_N.dtype}"
        tell_once("npu_add_rms_norm", f"{dtypes}, where all must be the same")
        return reference.add_rms_norm(x_TN, residual_TN, weight_N, eps)
    y_TN, _, sum_TN = torch_npu.npu_add_rms_norm(residual_TN, x_TN, weight_N, eps)
    return y_TN, sum_TN


def swiglu(x_T2N: Tensor) -> Tensor:
    """`Ops.swiglu`; differentiable."""
    y_TN: Tensor = torch_npu.npu_swiglu(x_T2N, dim=-1)
    return y_TN
