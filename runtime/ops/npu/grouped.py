"""Grouped products: one launch of `npu_grouped_matmul` for 1,024 groups, group lists that stay on the device.

Shape suffixes as in `base.py`. A group list holds counts or, cumulative, the row after each group's last.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch_npu
from torch import Tensor

from runtime.ops.lora_rows import LoraRows
from runtime.ops.told import tell_once

MAX_GROUPS = 1024
MAX_INNER_AXIS = 65_535
# Values of `group_type`: the groups divide the rows of a product, or the axis that it sums over.
_BY_ROWS, _BY_REDUCED_AXIS = 0, 2
_ONE_OUTPUT = 3  # of `split_item`; one output for each group would read the group list back to the host


def grouped_matmul(x_MK: Tensor, weight_GKN: Tensor, counts_G: Tensor) -> Tensor:
    """[M, N]; the weight may be a transposed view. Raises ValueError for sizes that the operator does not take.

    Of more groups than a launch takes each launch gets all rows: those of groups before its own are counted to its
    first group, those after are left out, and what is given for either is replaced.
    """
    num_groups = counts_G.shape[0]
    if num_groups <= MAX_GROUPS:
        # A list of counts must have more than one entry; of one entry the cumulative list is the same.
        return _multiplied(x_MK, weight_GKN, counts_G, is_cumulative=num_groups == 1)
    ends_G = counts_G.cumsum(0)
    rows_M1 = torch.arange(x_MK.shape[0], device=x_MK.device)[:, None]
    y_MN = _multiplied(x_MK, weight_GKN[:MAX_GROUPS], ends_G[:MAX_GROUPS], is_cumulative=True)
    for groups in _launches(num_groups)[1:]:
        part_MN = _multiplied(x_MK, weight_GKN[groups], ends_G[groups], is_cumulative=True)
        y_MN = torch.where(rows_M1 < ends_G[groups.start - 1], y_MN, part_MN)
    return y_MN


def grouped_outer(x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
    """Each group's x^T y, float32 [G, K, N], zeros for a group without rows."""
    num_groups = counts_G.shape[0]
    _require_inner_axis("inputs", x_MK.shape[1])
    _require_inner_axis("outputs", y_MN.shape[1])
    outer_GKN = x_MK.new_zeros(num_groups, x_MK.shape[1], y_MN.shape[1], dtype=torch.float32)
    if not x_MK.shape[0] or not num_groups:
        return outer_GKN
    x_MK, y_MN, ends_G = x_MK.contiguous(), y_MN.contiguous(), counts_G.cumsum(0)
    if num_groups <= MAX_GROUPS:
        _add_outer_(outer_GKN, x_MK, y_MN, ends_G)
        return outer_GKN
    rows_M1 = torch.arange(x_MK.shape[0], device=x_MK.device)[:, None]
    for groups in _launches(num_groups):
        # Rows of groups before these are counted to the first one, so they are zeros here; those after are left out.
        first_row = ends_G[groups.start - 1] if groups.start else 0
        _add_outer_(outer_GKN[groups], x_MK.masked_fill(rows_M1 < first_row, 0), y_MN, ends_G[groups])
    return outer_GKN


def _add_outer_(outer_GKN: Tensor, x_MK: Tensor, y_MN: Tensor, ends_G: Tensor) -> None:
    if x_MK.dtype is not torch.float32 and adds_in_place(x_MK.dtype, x_MK.device):
        torch_npu.npu_grouped_matmul_add_(outer_GKN, x_MK, y_MN, ends_G, group_type=_BY_REDUCED_AXIS, group_list_type=0)
        return
    # The summed axis is the inner one of x as it is given.
    for first in range(0, x_MK.shape[0], MAX_INNER_AXIS):
        rows = slice(first, min(first + MAX_INNER_AXIS, x_MK.shape[0]))
        products: Sequence[Tensor] = torch_npu.npu_grouped_matmul(
            [x_MK[rows].T],
            [y_MN[rows]],
            group_list=(ends_G - first).clamp(0, rows.stop - first),
            split_item=_ONE_OUTPUT,
            group_type=_BY_REDUCED_AXIS,
            group_list_type=0,
        )
        outer_GKN += products[0].view(outer_GKN.shape)


@cache
def adds_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has `npu_grouped_matmul_add_`, tried once; documents differ on A2 and A3."""
    problem = None
    if not hasattr(torch_npu, "npu_grouped_matmul_add_"):
        problem = "this torch_npu has no such operator"
    else:
        try:
            sum_GKN, x_MK = torch.zeros(1, 16, 16, device=device), torch.zeros(16, 16, dtype=dtype, device=device)
            ends_G = torch.full((1,), 16, dtype=torch.int64, device=device)
            torch_npu.npu_grouped_matmul_add_(sum_GKN, x_MK, x_MK, ends_G, group_type=2, group_list_type=0)
        except RuntimeError as error:  # what torch_npu raises where CANN or the device lacks an operator
            problem = f"{device} refuses it ({str(error).partition(chr(10))[0]})"
    if problem is not None:
        instead = "npu_grouped_matmul, which rounds each group's product to 16 bits"
        tell_once("npu_grouped_matmul_add_", problem, instead)
    return problem is None


def _launches(num_groups: int) -> list[slice]:
    return [slice(first, min(first + MAX_GROUPS, num_groups)) for first in range(0, num_groups, MAX_GROUPS)]


def lora_add_(y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], lora: LoraRows) -> None:
    """`Ops.lora_add_`: all rows in their order, each launch over as many pages as a group list may have.

    Rows of other launches' pages are counted to a launch's first or last page, so that every launch has packed rows and
    fixed shapes; what such rows, and rows without a page, give is replaced by zeros between the two products.
    """
    if not x_MK.shape[0]:
        return
    for pages in _launches(lora.num_pages):
        ends, without_page_M1 = lora.part(pages, x_MK.shape[0])
        shrunk_MR = _multiplied(x_MK, a_PKR[pages], ends, is_cumulative=True)
        if without_page_M1 is not None:
            shrunk_MR.masked_fill_(without_page_M1, 0)
        parts = zip(y_MN.chunk(len(bs_PRN), dim=1), _column_parts(shrunk_MR, len(bs_PRN)), bs_PRN, strict=True)
        for y_part, part_MR, b_PRN in parts:
            y_part += _multiplied(part_MR, b_PRN[pages], ends, is_cumulative=True)


def _column_parts(x_MR: Tensor, num_parts: int) -> Sequence[Tensor]:
    """Equal parts of the columns, contiguous after one copy of them all."""
    if num_parts == 1:
        return (x_MR,)
    parts_GMR: Tensor = x_MR.unflatten(1, (num_parts, -1)).transpose(0, 1).contiguous()
    return parts_GMR.unbind(0)


def _multiplied(x_MK: Tensor, weight_GKN: Tensor, group_list_G: Tensor, *, is_cumulative: bool) -> Tensor:
    _require_inner_axis("inputs", x_MK.shape[1])
    if weight_GKN.is_contiguous():
        _require_inner_axis("outputs", weight_GKN.shape[2])
    if not x_MK.shape[0]:
        return x_MK.new_empty(0, weight_GKN.shape[2])
    products: Sequence[Tensor] = torch_npu.npu_grouped_matmul(
        [x_MK.contiguous()],
        [weight_GKN],
        group_list=group_list_G,
        split_item=_ONE_OUTPUT,
        group_type=_BY_ROWS,
        group_list_type=0 if is_cumulative else 1,
    )
    return products[0]


def _require_inner_axis(what: str, size: int) -> None:
    if size > MAX_INNER_AXIS:
        raise ValueError(f"npu_grouped_matmul: {size} {what} of a weight, but it takes {MAX_INNER_AXIS}")
