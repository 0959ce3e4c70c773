"""Collectives with gradients: the borders of tensor-parallel regions, and the exchange of rows between experts."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed.mesh import Group


def enter_parallel(x: Tensor, group: Group) -> Tensor:
    """Before the processes of a group go separate ways with equal inputs: gradients are summed on the way back."""
    return x if group.handle is None else cast(Tensor, _Enter.apply(x, group))  # type: ignore[no-untyped-call]


def leave_parallel(x: Tensor, group: Group) -> Tensor:
    """Where partial results meet: summed over the group; the gradient goes to all of them as it is."""
    return x if group.handle is None else cast(Tensor, _Leave.apply(x, group))  # type: ignore[no-untyped-call]


def exchange_rows(x_NK: Tensor, num_sent: list[int], num_received: list[int], group: Group) -> Tensor:
    """Send `num_sent[i]` consecutive rows to the group's i-th process, get `num_received[i]` from it, in its order."""
    if group.handle is None:
        return x_NK
    return cast(Tensor, _Exchange.apply(x_NK, num_sent, num_received, group))  # type: ignore[no-untyped-call]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_sent: list[int], num_received: list[int], group: Group) -> Tensor:
        ctx.num_sent, ctx.num_received, ctx.group = num_sent, num_received, group
        return _exchanged(x, num_sent, num_received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.num_received, ctx.num_sent, ctx.group), None, None, None


def _summed(x: Tensor, group: Group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group.handle)
    return total


def _exchanged(x: Tensor, num_sent: list[int], num_received: list[int], group: Group) -> Tensor:
    received = x.new_empty(sum(num_received), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), num_received, num_sent, group=group.handle)
    return received


def max_over(x: Tensor, group: Group) -> Tensor:
    """Element by element maximum over the group, without a gradient."""
    if group.handle is None:
        return x.detach()
    largest = x.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.handle)
    return largest
