"""What every kernel of the bench checks with: a refusal that names operator, argument, value and limit; and poison."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch
from torch import Tensor

MAX_INNER_AXIS = 65535
MAX_GROUPS = 1024
MAX_TENSORS_IN_LIST = 128
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_HOST_MARK = "_npu_bench_is_on_host"


class BenchError(RuntimeError):
    """A call that would fail, or read or write what it must not, on an Ascend device."""


def refuse(operator: str, argument: str, value: object, limit: str) -> NoReturn:
    raise BenchError(f"{operator}: {argument} = {value}, but {limit}")


def require(held: bool, operator: str, argument: str, value: object, limit: str) -> None:
    """Raise BenchError unless `held`; `limit` says what must hold of the argument."""
    if not held:
        refuse(operator, argument, value, limit)


def require_one_of(operator: str, argument: str, value: object, allowed: Collection[object]) -> None:
    require(value in allowed, operator, argument, value, f"it must be one of {', '.join(map(str, allowed))}")


def require_dtype(operator: str, argument: str, tensor: Tensor, allowed: Collection[torch.dtype]) -> None:
    require_one_of(operator, f"{argument}.dtype", tensor.dtype, allowed)


def require_same_dtype(operator: str, argument: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    limit = f"{other_name} has {other.dtype} and both must be the same"
    require(tensor.dtype == other.dtype, operator, f"{argument}.dtype", tensor.dtype, limit)


def require_shape(operator: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> None:
    require(list(tensor.shape) == list(shape), operator, f"{argument}.shape", list(tensor.shape),
            f"it must be {list(shape)}")


def require_rank(operator: str, argument: str, tensor: Tensor, rank: int) -> None:
    require(tensor.dim() == rank, operator, f"{argument}.dim()", tensor.dim(), f"it must be {rank}")


def require_contiguous(operator: str, argument: str, tensor: Tensor) -> None:
    require(tensor.is_contiguous(), operator, f"{argument}.stride()", tensor.stride(), "it must be contiguous")


def require_inner_axis(operator: str, argument: str, size: int) -> None:
    """The last axis as it lies in memory."""
    require(size <= MAX_INNER_AXIS, operator, f"inner axis of {argument}", size, f"it must be <= {MAX_INNER_AXIS}")


def refuse_unmodelled(operator: str, **arguments: object) -> None:
    """Arguments of the operator that this bench has no kernel for (quantisation and the like)."""
    for name, value in arguments.items():
        require(value is None, operator, name, "given", "the bench models the unquantised form without it only")


def on_host(tensor: Tensor) -> Tensor:
    """Mark a tensor as one that lies in host memory: the kernels refuse it.

    All tensors of the bench are CPU tensors, so where one lies on a real machine cannot be told by its device. A host
    list of integers is told apart by its overload (`.List`); a host tensor only by this mark. The other way round, a
    device tensor given for a list of integers is read back by torch before any kernel sees it; a test that forbids
    `_local_scalar_dense` finds that.
    """
    setattr(tensor, _HOST_MARK, True)
    return tensor


def is_on_host(tensor: Tensor) -> bool:
    return bool(getattr(tensor, _HOST_MARK, False))


def poison(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that the device does not write: NaN, or the smallest integer."""
    return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)
