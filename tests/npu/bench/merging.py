"""npu_attention_update and npu_transpose_batchmatmul.

Shape suffixes: T tokens, B batch (heads), M, K and N matrix sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.npu.bench.limits import (
    FLOATS,
    poison,
    refuse_unmodelled,
    require,
    require_dtype,
    require_inner_axis,
    require_one_of,
    require_rank,
    require_same_dtype,
    require_shape,
)
from tests.npu.bench.registry import kernel

UPDATE = "npu_attention_update"
TBMM = "npu_transpose_batchmatmul"
MAX_PARTS = 16
FORMAT_NZ = 29
MAX_TBMM = 65535


@kernel(UPDATE)
def attention_update(lse: list[Tensor], local_out: list[Tensor], update_type: int) -> tuple[Tensor, Tensor]:
    """Join partial attentions [T, D] by their log-sum-exp [T]; type 1 returns the joined log-sum-exp too."""
    require_one_of(UPDATE, "update_type", update_type, (0, 1))
    require(1 <= len(lse) <= MAX_PARTS, UPDATE, "len(lse)", len(lse), f"1..{MAX_PARTS} parts are possible")
    require(len(lse) == len(local_out), UPDATE, "len(local_out)", len(local_out), f"lse has {len(lse)}")
    first = local_out[0]
    require_dtype(UPDATE, "local_out", first, FLOATS)
    require_rank(UPDATE, "local_out", first, 2)
    width = first.shape[1]
    require(8 <= width <= 512 and width % 8 == 0, UPDATE, "width", width, "it must be a multiple of 8 in 8..512")
    for part_lse, part in zip(lse, local_out, strict=True):
        require_dtype(UPDATE, "lse", part_lse, (torch.float32,))
        require_shape(UPDATE, "lse", part_lse, first.shape[:1])
        require_same_dtype(UPDATE, "local_out", part, "local_out[0]", first)
        require_shape(UPDATE, "local_out", part, first.shape)
    together = torch.stack(lse)
    highest = together.amax(0)
    joined = highest + (together - highest).exp().sum(0).log()
    shares = (together - joined).exp()[..., None]
    out = (torch.stack(local_out).float() * shares).sum(0)
    return out.to(first.dtype), joined if update_type == 1 else poison(joined.shape, torch.float32)


@kernel(TBMM)
def transpose_batchmatmul(
    input: Tensor, weight: Tensor, *, bias: Tensor | None = None, scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None, perm_x2: Sequence[int] | None = None, perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:
    """[B, M, K] (or [M, B, K] with perm_x1 = 1, 0, 2) times [B, K, N], written as [M, B, N]."""
    refuse_unmodelled(TBMM, bias=bias, scale=scale)
    require_one_of(TBMM, "batch_split_factor", batch_split_factor, (1,))
    require_one_of(TBMM, "perm_x1", tuple(perm_x1 or (0, 1, 2)), ((0, 1, 2), (1, 0, 2)))
    require_one_of(TBMM, "perm_x2", tuple(perm_x2 or (0, 1, 2)), ((0, 1, 2),))
    require_one_of(TBMM, "perm_y", tuple(perm_y or (1, 0, 2)), ((1, 0, 2),))
    require_dtype(TBMM, "input", input, FLOATS)
    require_same_dtype(TBMM, "weight", weight, "input", input)
    for name, tensor in (("input", input), ("weight", weight)):
        require_rank(TBMM, name, tensor, 3)
        require_inner_axis(TBMM, name, tensor.shape[-1])
    batch, inner, columns = weight.shape
    exchanged = tuple(perm_x1 or ()) == (1, 0, 2)
    x_BMK = input.transpose(0, 1) if exchanged else input
    require(x_BMK.shape[0] == batch and x_BMK.shape[2] == inner, TBMM, "input.shape", list(input.shape),
            f"weight is {list(weight.shape)}")
    require(inner % 16 == 0 and columns % 16 == 0, TBMM, "K, N", (inner, columns), "both must be multiples of 16")
    # Known callers also fall back where B K is larger without a permutation; the document limits K alone there.
    limited = inner * batch if exchanged else inner
    require(limited <= MAX_TBMM, TBMM, "B K" if exchanged else "K", limited, f"it must be <= {MAX_TBMM}")
    return torch.bmm(x_BMK.float(), weight.float()).transpose(0, 1).to(input.dtype).contiguous()
