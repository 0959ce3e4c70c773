"""npu_grouped_matmul on the bench, against one plain product for each group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.npu.real_meta import run_as_meta_says

COUNTS = [3, 0, 4, 1]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def group_list(list_type: int, counts: list[int] = COUNTS) -> Tensor:
    counted = torch.tensor(counts)
    return counted if list_type == 1 else counted.cumsum(0)


def expected(x_MK: Tensor, weights: list[Tensor]) -> Tensor:
    parts = x_MK[: sum(COUNTS)].double().split(COUNTS)
    return torch.cat([part @ weight.double() for part, weight in zip(parts, weights, strict=True)])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("list_type", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_group_multiplies_its_rows_and_rows_past_the_sum_are_nan(
    dtype: torch.dtype, list_type: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 24).to(dtype)
    weight = torch.randn(4, 40, 24).to(dtype).transpose(1, 2) if transposed else torch.randn(4, 24, 40).to(dtype)
    (y,) = run_as_meta_says("npu_grouped_matmul", [x], [weight], group_list=group_list(list_type),
                            group_list_type=list_type, group_type=0, split_item=2)
    torch.testing.assert_close(y[:8].double(), expected(x, list(weight)), rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    assert y[8:].isnan().all()


def test_weights_may_be_a_list_of_matrices() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 24).bfloat16()
    weights = [torch.randn(24, 40).bfloat16() for _ in range(4)]
    (y,) = run_as_meta_says("npu_grouped_matmul", [x], weights, group_list=group_list(1), group_list_type=1,
                            group_type=0, split_item=3)
    torch.testing.assert_close(y.double(), expected(x, weights), rtol=2e-2, atol=2e-2)


def test_a_bias_is_added_to_the_rows_of_its_group() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(8, 24), torch.randn(4, 24, 40), torch.randn(4, 40)
    (y,) = run_as_meta_says("npu_grouped_matmul", [x], [weight], bias=[bias], group_list=group_list(0), group_type=0,
                            split_item=2)
    biases = bias.repeat_interleave(torch.tensor(COUNTS), 0)
    torch.testing.assert_close(y, expected(x, list(weight)).float() + biases, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("list_type", [0, 1])
def test_split_over_the_rows_gives_each_weights_gradient_and_zeros_for_an_idle_group(
    dtype: torch.dtype, list_type: int
) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(8, 24).to(dtype), torch.randn(8, 40).to(dtype)
    weight = torch.zeros(4, 24, 40, dtype=torch.double, requires_grad=True)
    expected(x, list(weight)).backward(dy.double())
    (outer,) = run_as_meta_says("npu_grouped_matmul", [x.t()], [dy], group_list=group_list(list_type),
                                group_list_type=list_type, group_type=2, split_item=3)
    assert weight.grad is not None
    torch.testing.assert_close(outer.double(), weight.grad, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    assert not outer[1].any()


def test_independent_products_take_no_group_list() -> None:
    x, weights = [torch.randn(2, 8), torch.randn(3, 16)], [torch.randn(8, 4), torch.randn(16, 5)]
    halves = [[tensor.bfloat16() for tensor in tensors] for tensors in (x, weights)]
    results = run_as_meta_says("npu_grouped_matmul", *halves, group_type=-1, split_item=0)
    for y, one, other in zip(results, *halves, strict=True):
        torch.testing.assert_close(y.float(), one.float() @ other.float(), rtol=2e-2, atol=2e-2)


def test_the_adding_form_keeps_what_was_in_its_float32_accumulator() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(9, 24).bfloat16(), torch.randn(9, 40).bfloat16()
    before = torch.randn(4, 24, 40)
    total = before.clone()
    result = run_as_meta_says("npu_grouped_matmul_add_", total, x, dy, group_list(0))
    pairs = zip(x[:8].split(COUNTS), dy[:8].split(COUNTS), strict=True)
    products = [one.float().T @ other.float() for one, other in pairs]
    torch.testing.assert_close(total, before + torch.stack(products), rtol=1e-5, atol=1e-5)
    assert result.data_ptr() == total.data_ptr()
