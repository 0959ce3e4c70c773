"""npu_format_cast and get_npu_format: which tensors lie in fractals.

The numbers stay where they are, so products with such a tensor are right, as they are on the device; that it is not
read as plain memory is for the kernels to check, by `is_in_fractals`. torch_npu has no shape functions for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.npu.bench.limits import refuse_unmodelled, require, require_contiguous, require_dtype, require_one_of
from tests.npu.bench.registry import kernel

CAST = "npu_format_cast"
ND, FRACTAL_NZ = 2, 29
_fractals: set[StorageWeakRef] = set()


@kernel(CAST, on_meta=True)
def format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The same numbers; on the device their order in memory changes. FRACTAL_NZ is refused unless aligned."""
    refuse_unmodelled(CAST, customize_dtype=customize_dtype, input_dtype=input_dtype)
    require_one_of(CAST, "acl_format", acl_format, (ND, FRACTAL_NZ))
    require_contiguous(CAST, "input", input)
    cast = input.clone()
    if acl_format == FRACTAL_NZ:
        require_dtype(CAST, "input", input, (torch.float16, torch.bfloat16, torch.int8))
        require(input.dim() in (2, 3), CAST, "input.dim()", input.dim(), "it must be 2 or 3")
        rows, columns = input.shape[-2:]
        unit = 32 if input.dtype == torch.int8 else 16
        require(rows % 16 == 0 and columns % unit == 0, CAST, "K, N", (rows, columns),
                f"FRACTAL_NZ needs multiples of 16 and {unit}")
        _fractals.add(StorageWeakRef(cast.untyped_storage()))
    return cast


@kernel("get_npu_format", on_meta=True)
def format_of(input: Tensor) -> int:
    return FRACTAL_NZ if is_in_fractals(input) else ND


def is_in_fractals(tensor: Tensor) -> bool:
    """Whether the tensor's memory, or that which it is a view of, was cast."""
    return StorageWeakRef(tensor.untyped_storage()) in _fractals
