"""Device operations of training against their references: transposed weights, products along rows, attention."""

from __future__ import annotations

import pytest
import torch

from runtime.ops import reference
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.cuda.ops import CudaOps

BACK_ENDS = (CpuOps(), CudaOps())
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
COUNTS = {
    "few rows": [1, 0, 2, 0, 1],
    "many rows": [40, 0, 17, 3, 8],
    "one group": [0, 0, 0, 0, 5],
    "no rows": [0, 0, 0, 0, 0],
}


def _names(value: object) -> str:
    return type(value).__name__ if isinstance(value, Ops) else str(value)


with_back_ends = pytest.mark.parametrize("ops", BACK_ENDS, ids=_names)
with_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
with_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def _close(seen: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(seen.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@with_back_ends
@with_dtypes
@with_counts
@pytest.mark.parametrize("widths", [(48, 16), (16, 48), (8, 704)], ids=str)
def test_a_grouped_weight_may_be_a_transposed_view(
    ops: Ops, dtype: torch.dtype, counts: list[int], widths: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), widths[0]).to(dtype)
    weight = (torch.randn(len(counts), widths[1], widths[0]) / 7).to(dtype)
    groups = zip(x.float().split(counts), weight.float(), strict=True)
    expected = torch.cat([rows @ of_group.T for rows, of_group in groups])
    view, counts_G = weight.transpose(1, 2)[:, None], torch.tensor(counts)
    _close(reference.grouped_matmul(x.float(), view.float(), counts_G), expected, torch.float32)
    seen = ops.grouped_matmul(x, view, counts_G)
    assert seen.dtype is dtype
    _close(seen, expected, dtype)


@with_back_ends
@with_dtypes
@with_counts
@pytest.mark.parametrize("is_view", [False, True], ids=["as it lies", "transposed view"])
def test_a_grouped_product_is_added_in_place(
    ops: Ops, dtype: torch.dtype, counts: list[int], is_view: bool
) -> None:
    torch.manual_seed(1)
    x, start = torch.randn(sum(counts), 16).to(dtype), torch.randn(sum(counts), 24).to(dtype)
    shape = (len(counts), 24, 16) if is_view else (len(counts), 16, 24)
    weight = (torch.randn(shape) / 4).to(dtype)
    panels = (weight.transpose(1, 2) if is_view else weight)[:, None]
    expected = start.float() + reference.grouped_matmul(x.float(), panels.float(), torch.tensor(counts))
    seen = start.clone()
    ops.grouped_matmul_add_(seen, x, panels, torch.tensor(counts))
    _close(seen, expected, dtype)


@with_dtypes
@with_counts
def test_a_product_of_several_panels_is_added_to_all_columns(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(1)
    x, start = torch.randn(sum(counts), 16).to(dtype), torch.randn(sum(counts), 24).to(dtype)
    panels = (torch.randn(len(counts), 3, 16, 8) / 4).to(dtype)
    seen = start.clone()
    CpuOps().grouped_matmul_add_(seen, x, panels, torch.tensor(counts))
    _close(seen, start.float() + reference.grouped_matmul(x.float(), panels.float(), torch.tensor(counts)), dtype)


@with_back_ends
@with_dtypes
@with_counts
def test_a_grouped_outer_product_is_float32_and_zero_for_groups_without_rows(
    ops: Ops, dtype: torch.dtype, counts: list[int]
) -> None:
    torch.manual_seed(2)
    x, y = torch.randn(sum(counts), 16).to(dtype), torch.randn(sum(counts), 24).to(dtype)
    pairs = zip(x.double().split(counts), y.double().split(counts), strict=True)
    expected = torch.stack([of_x.T @ of_y for of_x, of_y in pairs]).float()
    counts_G = torch.tensor(counts)
    _close(reference.grouped_outer(x, y, counts_G), expected, torch.float32)
    seen = ops.grouped_outer(x, y, counts_G)
    assert seen.dtype is torch.float32
    assert seen[counts_G == 0].count_nonzero() == 0
    # CUDA's product comes in the dtype of its factors.
    tolerance = 2e-5 if isinstance(ops, CpuOps) else TOLERANCE[dtype]
    torch.testing.assert_close(seen, expected, atol=tolerance, rtol=tolerance)


@with_back_ends
@with_dtypes
def test_swiglu_backward_is_autograd_of_swiglu(ops: Ops, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, grad = (torch.randn(9, 40) * 3).to(dtype), torch.randn(9, 20).to(dtype)
    leaf = x.float().clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(grad.float())
    grad_x = ops.swiglu_backward(x, grad)
    assert grad_x.dtype is dtype
    assert leaf.grad is not None
    _close(grad_x, leaf.grad, dtype)


@with_back_ends
@with_dtypes
@pytest.mark.parametrize("widths", [(12, 7), (6, 9)], ids=["narrow values", "wide values"])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_attention_and_its_gradients_equal_plain_causal_attention(
    ops: Ops, dtype: torch.dtype, widths: tuple[int, int], num_tokens: int
) -> None:
    """Against a softmax written out in float64, document by document and head by head."""
    torch.manual_seed(4)
    shapes = ((2, 3, num_tokens, width) for width in (widths[0], widths[0], widths[1]))
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    scores = torch.einsum("dhqx,dhkx->dhqk", exact[0], exact[1]) * 0.3
    expected = torch.einsum("dhqk,dhkv->dhqv", scores.masked_fill(~mask, -torch.inf).softmax(-1), exact[2])
    grad = torch.randn(expected.shape).to(dtype)
    seen = ops.attention(*leaves, 0.3)
    assert seen.dtype is dtype
    _close(seen.detach(), expected.detach().float(), dtype)
    _close(reference.attention(*leaves, 0.3).detach(), expected.detach().float(), dtype)
    found = torch.autograd.grad(seen, leaves, grad)
    for ours, truth in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        _close(ours, truth.float(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_sums_its_rows_in_float32(dtype: torch.dtype) -> None:
    y_MN, places_TE = torch.randn(40, 24).to(dtype), torch.randperm(40)[:36].view(9, 4)
    expected = y_MN[places_TE].double().sum(1)
    for ops in (CpuOps(), CudaOps()):
        found = ops.sum_rows(y_MN, places_TE)
        assert found.dtype is dtype
        assert (found.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert CpuOps().sum_rows(y_MN[:0], places_TE[:0]).shape == (0, 24)
