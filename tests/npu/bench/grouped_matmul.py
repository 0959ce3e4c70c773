"""npu_grouped_matmul and npu_grouped_matmul_add_, unquantised.

Shape suffixes: M rows, K and N matrix sides, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.npu.bench.limits import (
    FLOATS,
    HALVES,
    MAX_GROUPS,
    MAX_TENSORS_IN_LIST,
    poison,
    refuse,
    refuse_unmodelled,
    require,
    require_contiguous,
    require_dtype,
    require_inner_axis,
    require_one_of,
    require_rank,
    require_same_dtype,
    require_shape,
)
from tests.npu.bench.registry import kernel

GMM = "npu_grouped_matmul"
ADD = "npu_grouped_matmul_add_"
BIAS_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float16, torch.float32: torch.float32}
# `output_dtype` arrives as the number of the torch dtype.
DTYPE_OF_NUMBER = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


@kernel(f"{GMM}.List")
def grouped_matmul_with_a_host_list(*_: object, group_list: Sequence[int] | None = None, **__: object) -> list[Tensor]:
    if group_list is None:
        refuse(GMM, "group_list", None, "the bench takes calls without a group list by the Tensor overload only")
    refuse(GMM, "group_list", list(group_list), "it must be an int64 tensor on the device: a host list costs a "
           "synchronisation each step, holds 128 groups at most and cannot be captured in a graph")


@kernel(GMM)
def grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, bias: list[Tensor] | None = None, scale: list[Tensor] | None = None,
    offset: list[Tensor] | None = None, antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None, per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None, activation_input: list[Tensor] | None = None,
    activation_quant_scale: list[Tensor] | None = None, activation_quant_offset: list[Tensor] | None = None,
    split_item: int | None = 0, group_type: int | None = None, group_list_type: int | None = 0,
    act_type: int | None = 0, tuning_config: list[int] | None = None, output_dtype: int | None = None,
    x_dtype: int | None = None, weight_dtype: int | None = None, scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    refuse_unmodelled(
        GMM, scale=scale, offset=offset, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset,
        per_token_scale=per_token_scale, activation_input=activation_input, tuning_config=tuning_config,
        activation_quant_scale=activation_quant_scale, activation_quant_offset=activation_quant_offset,
        x_dtype=x_dtype, weight_dtype=weight_dtype, scale_dtype=scale_dtype,
        per_token_scale_dtype=per_token_scale_dtype,
    )
    require_one_of(GMM, "group_type", group_type, (-1, 0, 2))
    require_one_of(GMM, "act_type", act_type, (0,))
    _require_dtypes(x, weight, bias, output_dtype)
    if group_type == -1:
        return _independent(x, weight, bias, group_list, split_item)
    # 0 and 1 make one output for each group, for which the glue reads the group list back to the host.
    require_one_of(GMM, "split_item", split_item, (2, 3))
    require(len(x) == 1, GMM, "len(x)", len(x), "one tensor of rows goes with a group list")
    require(group_list is not None, GMM, "group_list", None, f"group_type {group_type} needs it")
    assert group_list is not None
    if group_type == 2:
        require(bias is None, GMM, "bias", "given", "it must be None where the reduced axis is grouped")
        require(len(weight) == 1, GMM, "len(weight)", len(weight), "it must be 1 where the reduced axis is grouped")
        return [_split_over_k(x[0], weight[0], group_list, group_list_type)]
    return [_split_over_m(x[0], weight, bias, group_list, group_list_type)]


def _require_dtypes(
    x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, output_dtype: int | None
) -> None:
    require(bool(x) and bool(weight), GMM, "len(x), len(weight)", (len(x), len(weight)), "neither may be empty")
    require(len(weight) <= MAX_TENSORS_IN_LIST, GMM, "len(weight)", len(weight), f"it must be <= {MAX_TENSORS_IN_LIST}")
    require_dtype(GMM, "x", x[0], FLOATS)
    for tensor in (*x, *weight):
        require_same_dtype(GMM, "a tensor of x and weight", tensor, "x[0]", x[0])
    single = len(x) == 1 and len(weight) == 1
    require(single or x[0].dtype != torch.float32, GMM, "x.dtype", x[0].dtype, "lists of tensors must be 16 bit wide")
    for tensor in bias or ():
        require(tensor.dtype == BIAS_DTYPE[x[0].dtype], GMM, "bias.dtype", tensor.dtype,
                f"it must be {BIAS_DTYPE[x[0].dtype]} with x of {x[0].dtype}")
    # The table of pairs has an unquantised product in the type of its inputs only.
    asked = x[0].dtype if output_dtype is None else DTYPE_OF_NUMBER.get(output_dtype, output_dtype)
    require(asked == x[0].dtype, GMM, "output_dtype", asked, f"it must be that of x, {x[0].dtype}, or None")


def is_transposed(tensor: Tensor) -> bool:
    """Whether the last two axes are those of a contiguous matrix, exchanged."""
    return not tensor.is_contiguous() and tensor.stride(-2) == 1 and tensor.stride(-1) == tensor.size(-2)


def _require_layout(argument: str, weight: Tensor) -> None:
    """Contiguous, or a true transposed view of contiguous memory."""
    require_inner_axis(GMM, argument, weight.shape[-2] if is_transposed(weight) else weight.shape[-1])
    if weight.is_contiguous():
        return
    stacked = weight.dim() == 2 or weight.stride(0) == weight.shape[1] * weight.shape[2]
    require(stacked and is_transposed(weight), GMM, f"{argument}.stride()", weight.stride(),
            "it must be contiguous or the transposed view of a contiguous tensor, strides (K N, 1, K)")


def counts_of(
    operator: str, group_list: Tensor, group_list_type: int | None, num_groups: int, num_rows: int
) -> list[int]:
    """The rows of each group, after all checks of a group list; rows beyond the sum belong to no group."""
    require_one_of(operator, "group_list_type", group_list_type, (0, 1))
    require_dtype(operator, "group_list", group_list, (torch.int64,))
    require_rank(operator, "group_list", group_list, 1)
    require_contiguous(operator, "group_list", group_list)
    require(num_groups <= MAX_GROUPS, operator, "number of groups", num_groups, f"it must be <= {MAX_GROUPS}")
    require(len(group_list) == num_groups, operator, "len(group_list)", len(group_list),
            f"it must be the number of groups, {num_groups}")
    # Documented for counts; the checker of the library accepts it. The stricter of the two.
    require(not (group_list_type == 1 and num_groups == 1), operator, "len(group_list)", 1,
            "a list of counts must have more than one group; a cumulative list may have one")
    counts = group_list.diff(prepend=group_list.new_zeros(1)) if group_list_type == 0 else group_list
    listed = counts.tolist()
    what = "a cumulative list must not decrease" if group_list_type == 0 else "counts must not be negative"
    require(min(listed, default=0) >= 0, operator, "group_list", group_list.tolist(), what)
    require(sum(listed) <= num_rows, operator, "sum of group_list", sum(listed),
            f"x has {num_rows} rows only: the device would read past them")
    return listed


def _rows_of(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """(group, its rows) of the groups that have any."""
    found, start = [], 0
    for group, count in enumerate(counts):
        if count:
            found.append((group, slice(start, start + count)))
        start += count
    return found


def _product(x_MK: Tensor, weight_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    """Products are summed in float32 and rounded once, as on the cube cores."""
    y_MN = x_MK.float() @ weight_KN.float()
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(x_MK.dtype)


def _split_over_m(
    x_MK: Tensor, weight: list[Tensor], bias: list[Tensor] | None, group_list: Tensor, group_list_type: int | None
) -> Tensor:
    require_rank(GMM, "x", x_MK, 2)
    require_contiguous(GMM, "x", x_MK)
    # No document says what a product of no rows does.
    require(x_MK.shape[0] > 0, GMM, "rows of x", 0, "there must be one or more")
    require_inner_axis(GMM, "x", x_MK.shape[1])
    stacked = len(weight) == 1
    if stacked:
        require_rank(GMM, "weight", weight[0], 3)
    weights = list(weight[0]) if stacked else weight
    for tensor in weight:
        if not stacked:
            require_rank(GMM, "a tensor of weight", tensor, 2)
        _require_layout("weight", tensor)
        require(tensor.shape[-2] == x_MK.shape[1], GMM, "weight.shape", list(tensor.shape),
                f"x is {list(x_MK.shape)}: the inner sizes differ")
        alike = tensor.shape == weight[0].shape and is_transposed(tensor) == is_transposed(weight[0])
        require(alike, GMM, "weight", "mixed", "all tensors of a list must have one shape, all or none transposed")
    counts = counts_of(GMM, group_list, group_list_type, len(weights), x_MK.shape[0])
    num_columns = weights[0].shape[-1] if weights else 0
    biases = None if bias is None else list(bias[0]) if stacked else bias
    for row in biases or ():
        require_shape(GMM, "bias of a group", row, [num_columns])
    require(biases is None or len(biases) == len(weights), GMM, "bias", "given", "there must be a row for each group")
    y_MN = poison((x_MK.shape[0], num_columns), x_MK.dtype)
    for group, rows in _rows_of(counts):
        y_MN[rows] = _product(x_MK[rows], weights[group], None if biases is None else biases[group])
    return y_MN


def _split_over_k(x_KM: Tensor, dy_MN: Tensor, group_list: Tensor, group_list_type: int | None) -> Tensor:
    """Each group's x dy over its share of the rows M: [G, K, N]; zeros for a group without rows."""
    require_rank(GMM, "x", x_KM, 2)
    require_rank(GMM, "weight", dy_MN, 2)
    require(x_KM.stride(0) == 1 and x_KM.stride(1) == x_KM.shape[0], GMM, "x.stride()", x_KM.stride(),
            "group_type 2 needs the transposed view of contiguous [M, K] rows")
    require(dy_MN.is_contiguous(), GMM, "weight.stride()", dy_MN.stride(), "group_type 2 must not have it transposed")
    require(x_KM.shape[1] == dy_MN.shape[0], GMM, "weight.shape", list(dy_MN.shape),
            f"x is {list(x_KM.shape)}: the inner sizes differ")
    require(x_KM.shape[1] > 0, GMM, "rows of x", 0, "there must be one or more")
    for argument, size in (("x", x_KM.shape[1]), ("x in memory", x_KM.shape[0]), ("weight", dy_MN.shape[1])):
        require_inner_axis(GMM, argument, size)
    counts = counts_of(GMM, group_list, group_list_type, len(group_list), x_KM.shape[1])
    outer_GKN = x_KM.new_zeros(len(counts), x_KM.shape[0], dy_MN.shape[1])
    for group, rows in _rows_of(counts):
        outer_GKN[group] = _product(x_KM[:, rows], dy_MN[rows], None)
    return outer_GKN


def _independent(
    x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, group_list: Tensor | None, split_item: int | None
) -> list[Tensor]:
    require_one_of(GMM, "split_item", split_item, (0, 1))
    require(group_list is None, GMM, "group_list", "given", "group_type -1 takes none")
    require(len(x) == len(weight), GMM, "len(weight)", len(weight), f"x has {len(x)} tensors")
    for one, other in zip(x, weight, strict=True):
        require_rank(GMM, "a tensor of x", one, 2)
        require_rank(GMM, "a tensor of weight", other, 2)
        require_contiguous(GMM, "a tensor of x", one)
        require_inner_axis(GMM, "x", one.shape[1])
        _require_layout("weight", other)
        require(one.shape[1] == other.shape[0], GMM, "weight.shape", list(other.shape), f"x is {list(one.shape)}")
    biases = [None] * len(x) if bias is None else bias
    return [_product(*three) for three in zip(x, weight, biases, strict=True)]


@kernel(ADD)
def grouped_matmul_add_(
    input: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, *, transpose_x: bool = True,
    transpose_weight: bool = False, group_type: int = 2, group_list_type: int | None = 0,
) -> Tensor:
    """input[g] += x[rows of g]^T weight[rows of g]: float32 [G, K, N], x [M, K] and weight [M, N] untransposed."""
    require(transpose_x, ADD, "transpose_x", transpose_x, "it must be True")
    require(not transpose_weight, ADD, "transpose_weight", transpose_weight, "it must be False")
    require_one_of(ADD, "group_type", group_type, (2,))
    # The older kernel behind this operator ignores the type and reads a cumulative list.
    require_one_of(ADD, "group_list_type", group_list_type, (0,))
    require_dtype(ADD, "x", x, HALVES)
    require_same_dtype(ADD, "weight", weight, "x", x)
    require_dtype(ADD, "input", input, (torch.float32,))
    for argument, tensor in (("x", x), ("weight", weight), ("input", input)):
        require_contiguous(ADD, argument, tensor)
        require_inner_axis(ADD, argument, tensor.shape[-1])
    require_rank(ADD, "x", x, 2)
    require_rank(ADD, "weight", weight, 2)
    require(x.shape[0] == weight.shape[0], ADD, "weight.shape", list(weight.shape), f"x is {list(x.shape)}")
    require(x.shape[0] > 0, ADD, "rows of x", 0, "there must be one or more")
    require_shape(ADD, "input", input, [len(group_list), x.shape[1], weight.shape[1]])
    counts = counts_of(ADD, group_list, group_list_type, len(group_list), x.shape[0])
    for group, rows in _rows_of(counts):
        input[group] += x[rows].float().T @ weight[rows].float()
    return input
