"""Norms and SwiGLU on the bench, values and gradients, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch.nn import functional

from tests.npu.real_meta import run_as_meta_says

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_rms_norm_is_pytorchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(3, 5, 32).to(dtype), torch.randn(32).to(dtype)
    y, rstd = run_as_meta_says("npu_rms_norm", x, gamma, 1e-5)
    wanted = functional.rms_norm(x.float(), (32,), gamma.float(), 1e-5)
    torch.testing.assert_close(y.float(), wanted, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    torch.testing.assert_close(rstd, 1 / (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())


def test_rms_norms_gradient_is_pytorchs() -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    grad = torch.randn(6, 32)
    y, rstd = torch_npu.npu_rms_norm(x, gamma, 1e-5)
    found = torch.autograd.grad(y, (x, gamma), grad)
    wanted = torch.autograd.grad(functional.rms_norm(x, (32,), gamma, 1e-5), (x, gamma), grad)
    direct = run_as_meta_says("npu_rms_norm_backward", grad, x.detach(), gamma.detach(), rstd)
    for name, gradients in (("by autograd", found), ("by the backward operator", direct)):
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_add_rms_norm_also_returns_the_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one, other, gamma = (torch.randn(*shape).to(dtype) for shape in ((6, 32), (6, 32), (32,)))
    y, _, total = run_as_meta_says("npu_add_rms_norm", one, other, gamma)
    exact = one.double() + other.double()
    wanted = functional.rms_norm(exact, (32,), gamma.double(), 1e-6)
    torch.testing.assert_close(y.double(), wanted, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    torch.testing.assert_close(total, exact.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu_gates_with_the_first_half(dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    gate, up = x.chunk(2, dim)
    torch.testing.assert_close(run_as_meta_says("npu_swiglu", x, dim=dim), functional.silu(gate) * up)


def test_swiglus_gradient_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(6, 32, requires_grad=True), torch.randn(6, 16)
    (found,) = torch.autograd.grad(torch_npu.npu_swiglu(x), x, grad)
    (wanted,) = torch.autograd.grad(functional.silu(x[:, :16]) * x[:, 16:], x, grad)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(run_as_meta_says("npu_swiglu_backward", grad, x.detach()), wanted)
