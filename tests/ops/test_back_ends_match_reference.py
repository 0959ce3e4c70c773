"""Each device operation against its plain PyTorch reference, with the shapes and group sizes that differ in kind."""

from __future__ import annotations

import pytest
import torch

from runtime.ops import reference
from runtime.ops.base import Ops, make_ops
from runtime.ops.cpu import CpuOps
from runtime.ops.cuda.ops import CudaOps
from runtime.ops.lora_rows import LoraRows
from runtime.ops.routing import SortedRows

# The CUDA back-end is written in operations that PyTorch also has on CPU, so its logic is tested here too.
BACK_ENDS = (CpuOps(), CudaOps())
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def _names(value: object) -> str:
    return type(value).__name__ if isinstance(value, Ops) else str(value)


@pytest.mark.parametrize("ops", BACK_ENDS, ids=_names)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "counts", [[1, 0, 2, 0, 1], [40, 0, 17, 3, 8], [0, 0, 0, 0, 5]], ids=["decode", "prefill", "one group"]
)
@pytest.mark.parametrize("num_columns", [16, 704], ids=["one panel", "many panels"])
def test_grouped_matmul_equals_its_reference(ops: Ops, dtype: torch.dtype, counts: list[int], num_columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 48).to(dtype)
    weight = (torch.randn(len(counts), 48, 2 * num_columns) / 7).to(dtype)
    expected = torch.cat([rows @ w for rows, w in zip(x.float().split(counts), weight.float(), strict=True)])
    width = ops.panel_columns(2 * num_columns, num_parts=2)
    panels = weight.unflatten(2, (-1, width)).transpose(1, 2).contiguous()
    torch.testing.assert_close(reference.grouped_matmul(x.float(), panels.float(), torch.tensor(counts)), expected)
    seen = ops.grouped_matmul(x, panels, torch.tensor(counts))
    assert seen.dtype is dtype
    torch.testing.assert_close(seen.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("ops", BACK_ENDS, ids=_names)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "pages",
    [[-1, 0, 2, -1, 3], [0] * 20 + [-1] * 3 + [2] * 14, [0, 1, 2, 3], [-1, -1]],
    ids=["decode with base rows", "prefill with base rows", "every row another page", "base rows alone"],
)
def test_lora_add_equals_its_reference(ops: Ops, dtype: torch.dtype, parts: int, pages: list[int]) -> None:
    torch.manual_seed(1)
    x = torch.randn(len(pages), 40).to(dtype)
    a = (torch.randn(4, 40, 8 * parts) / 6).to(dtype)
    bs = tuple((torch.randn(4, 8, 24) / 3).to(dtype) for _ in range(parts))
    start = torch.randn(len(pages), 24 * parts).to(dtype)
    expected = start.float().clone()
    rows = LoraRows.of_pages(torch.tensor(pages), num_pages=4)
    reference.lora_add_(expected, x.float(), a.float(), [b.float() for b in bs], rows)
    seen = start.clone()
    ops.lora_add_(seen, x, a, bs, rows)
    torch.testing.assert_close(seen.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    untouched = torch.tensor(pages) < 0
    assert torch.equal(seen[untouched], start[untouched])


def test_rows_without_a_page_are_safe_from_what_is_in_other_memory() -> None:
    """A delta of a row without a page must not be 0 x NaN. B's are finite: the loader sees to it."""
    for ops in BACK_ENDS:
        a, b = torch.full((2, 16, 8), float("nan")), torch.full((2, 8, 16), 3e38)
        y = torch.ones(3, 16)
        ops.lora_add_(y, torch.ones(3, 16), a, (b,), LoraRows.of_pages(torch.tensor([-1, -1, -1]), num_pages=2))
        assert torch.equal(y, torch.ones(3, 16))


@pytest.mark.parametrize("ops", BACK_ENDS, ids=_names)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_combine_experts_is_each_tokens_weighted_sum(ops: Ops, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    choices = torch.randn(6, 3, 20).to(dtype)
    weights = torch.rand(6, 3)
    expected = torch.einsum("ten,te->tn", choices.double(), weights.double())
    rows = SortedRows(torch.empty(0), torch.empty(0), from_M=torch.randperm(18))
    y = choices.flatten(0, 1)[rows.order_M]
    seen = ops.combine_experts(y, rows, weights)
    assert seen.dtype is dtype
    torch.testing.assert_close(seen.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(reference.combine_experts(y, rows, weights), seen)


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'meta'"):
        make_ops(torch.device("meta"))


@pytest.mark.parametrize("ops", BACK_ENDS, ids=_names)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 70])
def test_a_packed_linear_weight_multiplies_as_the_plain_one(ops: Ops, dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(num_rows, 48).to(dtype), (torch.randn(40, 48) / 7).to(dtype)
    seen = ops.linear(x, ops.pack_linear(weight))
    assert seen.dtype is dtype
    torch.testing.assert_close(seen, ops.linear(x, weight), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
