"""Runs an operator on the bench and holds its result against torch_npu's own meta (shape) function."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor


def to_meta(value: Any) -> Any:
    """The value with every tensor replaced by a meta tensor of its shape, strides and type."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list | tuple):
        return type(value)(to_meta(item) for item in value)
    return value


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return [_form(item) for item in value] if isinstance(value, list | tuple) else type(value)


def run_as_meta_says(operator: str, *args: Any, **kwargs: Any) -> Any:
    """The bench's result of `torch_npu.<operator>`, whose shapes and types are those that torch_npu itself predicts."""
    function = getattr(torch_npu, operator, None) or getattr(torch.ops.npu, operator)
    predicted = function(*to_meta(args), **{name: to_meta(value) for name, value in kwargs.items()})
    result = function(*args, **kwargs)
    assert _form(result) == _form(predicted)
    return result


def causal_mask() -> Tensor:
    """The compressed mask of 2048 x 2048 that the attention operators take in causal modes."""
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)
