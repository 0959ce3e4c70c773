"""npu_rms_norm, npu_add_rms_norm and npu_swiglu, with the derivatives that torch_npu has."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.npu.bench.limits import FLOATS, refuse, require, require_dtype, require_same_dtype, require_shape
from tests.npu.bench.registry import kernel


def _require_norm(operator: str, x: Tensor, gamma: Tensor) -> None:
    require_dtype(operator, "input", x, FLOATS)
    require_same_dtype(operator, "gamma", gamma, "input", x)
    require(0 < gamma.dim() <= x.dim(), operator, "gamma.dim()", gamma.dim(), f"input has {x.dim()} axes")
    require_shape(operator, "gamma", gamma, x.shape[x.dim() - gamma.dim() :])


def _rms_norm_formula(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    axes = list(range(input.dim() - gamma.dim(), input.dim()))
    inverse = (input.float().pow(2).mean(axes, keepdim=True) + epsilon).rsqrt()
    return (input.float() * inverse * gamma.float()).to(input.dtype)


@kernel("npu_rms_norm", formula=_rms_norm_formula)
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The norm and the reciprocal root, float32, over gamma's axes; rounded once, after gamma."""
    _require_norm("npu_rms_norm", input, gamma)
    return _normed(input, gamma, epsilon)


def _normed(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    axes = list(range(x.dim() - gamma.dim(), x.dim()))
    rstd = torch.rsqrt(x.float().square().mean(axes, keepdim=True) + epsilon)
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


@kernel("npu_rms_norm_backward")
def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of input (its type) and gamma (float32)."""
    operator = "npu_rms_norm_backward"
    _require_norm(operator, input, gamma)
    require_same_dtype(operator, "dy", dy, "input", input)
    require_dtype(operator, "rstd", rstd, (torch.float32,))
    axes = list(range(input.dim() - gamma.dim(), input.dim()))
    normed = input.float() * rstd
    scaled = dy.float() * gamma.float()
    d_input = (scaled - normed * (scaled * normed).mean(axes, keepdim=True)) * rstd
    d_gamma = (dy.float() * normed).sum(list(range(input.dim() - gamma.dim())))
    return d_input.to(input.dtype), d_gamma


@kernel("npu_add_rms_norm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x1 + x2, the reciprocal root, and x1 + x2; the norm is taken of the sum before it is rounded."""
    operator = "npu_add_rms_norm"
    _require_norm(operator, x1, gamma)
    require_same_dtype(operator, "x2", x2, "x1", x1)
    require_shape(operator, "x2", x2, x1.shape)
    total = x1.float() + x2.float()
    normed, rstd = _normed(total, gamma.float(), epsilon)
    return normed.to(x1.dtype), rstd, total.to(x1.dtype)


def _halves(operator: str, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    require_dtype(operator, "input", x, FLOATS)
    if not -x.dim() <= dim < x.dim():
        refuse(operator, "dim", dim, f"input has {x.dim()} axes")
    require(x.shape[dim] % 2 == 0, operator, f"input.shape[{dim}]", x.shape[dim], "it must be even")
    gate, up = x.chunk(2, dim)
    return gate, up


def _swiglu_formula(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.chunk(2, dim)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(input.dtype)


@kernel("npu_swiglu", formula=_swiglu_formula)
def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) x second half, computed in float32."""
    gate, up = _halves("npu_swiglu", input, dim)
    return (gate.float() * gate.float().sigmoid() * up.float()).to(input.dtype)


@kernel("npu_swiglu_backward")
def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    operator = "npu_swiglu_backward"
    gate, up = (half.float() for half in _halves(operator, input, dim))
    require_same_dtype(operator, "grad_output", grad_output, "input", input)
    require_shape(operator, "grad_output", grad_output, gate.shape)
    grad, sigmoid = grad_output.float(), gate.sigmoid()
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, grad * gate * sigmoid), dim).to(input.dtype)
