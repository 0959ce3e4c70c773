"""Routed experts with LoRA, forward and backward by hand: two grouped projections, nothing kept that can be recomputed.

Shape suffixes: T input rows, M routed rows (sorted by expert), L those of adapted experts, E local experts,
G adapted ones, H hidden, I expert width, R LoRA rank, K choices of a row.
`reference_experts.py` is the same in plain operations, for tests and for reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.ops.base import Ops
from runtime.ops.frozen_groups import FrozenGroups
from runtime.trainer.dropout import Dropout
from runtime.trainer.expert_rows import ExpertRows, rows_of_part, with_whole_groups


@dataclass(frozen=True)
class BaseExperts:
    """Frozen weights: w13 [E, 2I, H] (gate, then up) and w2 [E, H, I]."""

    w13: FrozenGroups
    w2: FrozenGroups
    ops: Ops


@dataclass(frozen=True)
class ExpertFactors:
    """Float32 factors of the adapted experts: a13 [G, R, H], b13 [G, 2I, R], a2 [G, R, I], b2 [G, H, R]."""

    a13: Tensor
    b13: Tensor
    a2: Tensor
    b2: Tensor
    scale13: float
    scale2: float
    dropout13: Dropout | None = None
    dropout2: Dropout | None = None


def routed_experts(
    x_TH: Tensor, gates_M: Tensor, base: BaseExperts, factors: ExpertFactors | None, rows: ExpertRows
) -> Tensor:
    """The sum [T, H] over each row's experts, weighted by `gates_M` (float32, of the routed rows)."""
    tensors = (None,) * 4 if factors is None else (factors.a13, factors.b13, factors.a2, factors.b2)
    rows, gates_M = with_whole_groups(rows, gates_M, base.ops.routed_row_multiple)
    out_TH = _RoutedExperts.apply(x_TH, gates_M, *tensors, base, factors, rows)  # type: ignore[no-untyped-call]
    return cast(Tensor, out_TH)


@dataclass(frozen=True)
class _Like:
    """How the base computes."""

    ops: Ops
    dtype: torch.dtype


class _Adapted:
    """One projection's factors in the compute dtype, and the rows that they act on."""

    def __init__(
        self, a: Tensor, b: Tensor, scale: float, dropout: Dropout | None, rows: ExpertRows, like: _Like
    ) -> None:
        self.rank, multiple = a.shape[1], like.ops.lora_rank_multiple
        missing = -self.rank % multiple
        scaled_b = b.detach() if scale == 1 else b.detach() * scale
        self.a_GRK = pad(a.detach().to(like.dtype), (0, 0, 0, missing)) if missing else a.detach().to(like.dtype)
        self.b_GNR = pad(scaled_b.to(like.dtype), (0, missing)) if missing else scaled_b.to(like.dtype)
        self.scale, self.dropout, self.rows, self.ops = scale, dropout, rows, like.ops

    def shrink(self, x_MK: Tensor) -> Tensor:
        """x A^T of the adapted rows, [L, R]."""
        return self.ops.grouped_matmul(self._input(x_MK), _transposed(self.a_GRK), self.rows.counts_G)

    def expand_add_(self, y_MN: Tensor, h_LR: Tensor) -> None:
        """y += h B^T."""
        self._add_(y_MN, h_LR, _transposed(self.b_GNR))

    def backward(self, grad_MN: Tensor, x_MK: Tensor, h_LR: Tensor, grad_x_MK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of A and B; adds this projection's part to the gradient of x, if that is wanted."""
        grad_LN = self._chosen(grad_MN)
        grad_h_LR = self.ops.grouped_matmul(grad_LN, self.b_GNR[:, None], self.rows.counts_G)
        grad_b_GNR = self.ops.grouped_outer(grad_LN, h_LR, self.rows.counts_G)
        if self.scale != 1:
            grad_b_GNR.mul_(self.scale)
        grad_a_GRK = self.ops.grouped_outer(grad_h_LR, self._input(x_MK), self.rows.counts_G)
        if grad_x_MK is not None:
            self._add_input_gradient_(grad_x_MK, grad_h_LR)
        return grad_a_GRK[:, : self.rank], grad_b_GNR[..., : self.rank]

    def _add_input_gradient_(self, grad_x_MK: Tensor, grad_h_LR: Tensor) -> None:
        if self.dropout is None:
            self._add_(grad_x_MK, grad_h_LR, self.a_GRK[:, None])
        else:
            back_LK = self.ops.grouped_matmul(grad_h_LR, self.a_GRK[:, None], self.rows.counts_G)
            self._add_rows_(grad_x_MK, back_LK * self._mask(back_LK))

    def _input(self, x_MK: Tensor) -> Tensor:
        x_LK = self._chosen(x_MK)
        return x_LK if self.dropout is None else x_LK * self._mask(x_LK)

    def _mask(self, like_LK: Tensor) -> Tensor:
        if self.dropout is None or self.rows.ids_M is None:
            raise RuntimeError("dropout needs the rows' places in the run")
        return self.dropout.scaled_mask(self._chosen(self.rows.ids_M), like_LK.shape[1], 0, like_LK.dtype)

    def _chosen(self, x: Tensor) -> Tensor:
        return x if self.rows.rows_L is None else x.index_select(0, self.rows.rows_L)

    def _add_(self, y_MN: Tensor, x_LK: Tensor, weight_GJKN: Tensor) -> None:
        if self.rows.rows_L is None:
            self.ops.grouped_matmul_add_(y_MN, x_LK, weight_GJKN, self.rows.counts_G)
        else:
            self._add_rows_(y_MN, self.ops.grouped_matmul(x_LK, weight_GJKN, self.rows.counts_G))

    def _add_rows_(self, y_MN: Tensor, delta_LN: Tensor) -> None:
        if self.rows.rows_L is None:
            y_MN += delta_LN
        else:
            y_MN.index_add_(0, self.rows.rows_L, delta_LN)


@dataclass(frozen=True)
class _Part:
    """Consecutive experts with their rows, computed on their own; `gates` in the compute dtype, [M, 1].

    `span` and `adapted`: which of all routed rows and of all adapted experts these are.
    """

    base: BaseExperts
    rows: ExpertRows
    span: slice
    adapted: slice
    gates: Tensor
    first: _Adapted | None
    second: _Adapted | None


@dataclass(frozen=True)
class _Kept:
    """What a part keeps for backward."""

    gate_up: Tensor
    shrunk13: Tensor | None
    shrunk2: Tensor | None


@dataclass(frozen=True)
class _Gradients:
    """Of x's routed rows [M, H], of the gates [M], and of a13, b13, a2, b2; None where nothing wants them."""

    x: Tensor | None
    gates: Tensor
    factors: tuple[Tensor | None, ...]


class _RoutedExperts(torch.autograd.Function):
    """Gates are applied to the inner activations, so no gradient needs the output once more."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, gates_M: Tensor, *rest: Any) -> Tensor:
        *tensors, base, factors, rows = rest
        parts = _parts(x_TH, gates_M, tensors, base, factors, rows)
        whole_MH = x_TH.new_empty(len(gates_M), x_TH.shape[1]) if len(parts) > 1 else None
        outs = [None if whole_MH is None else whole_MH[part.span] for part in parts]
        tasks = [partial(_forward_part, x_TH, part, out_MH) for part, out_MH in zip(parts, outs, strict=True)]
        results = base.ops.side_by_side(tasks)
        kept = [tensor for _, part in results for tensor in (part.gate_up, part.shrunk13, part.shrunk2)]
        ctx.save_for_backward(x_TH, gates_M, *tensors, *kept)
        ctx.parts, ctx.ops, ctx.rows = parts, base.ops, rows
        return _sum_of_places(results[0][0] if whole_MH is None else whole_MH, rows, base.ops)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_TH, gates_M, a13, b13, a2, b2, *flat = ctx.saved_tensors
        parts, tensors = ctx.parts, (a13, b13, a2, b2)
        kept = [_Kept(*flat[3 * index : 3 * index + 3]) for index in range(len(parts))]
        wants_x = ctx.needs_input_grad[0]
        whole = _empty_gradients(x_TH, len(gates_M), tensors, wants_x=wants_x) if len(parts) > 1 else None
        tasks = [
            partial(_backward_part, x_TH, grads[0], part, own, whole, wants_x=wants_x)
            for part, own in zip(parts, kept, strict=True)
        ]
        results = ctx.ops.side_by_side(tasks)
        found = results[0] if whole is None else whole
        grad_x_TH = None if found.x is None else _sum_of_places(found.x, ctx.rows, ctx.ops)
        return grad_x_TH, found.gates.to(gates_M.dtype), *found.factors, None, None, None


def _empty_gradients(x_TH: Tensor, num_rows: int, tensors: Sequence[Tensor | None], *, wants_x: bool) -> _Gradients:
    """Room for the gradients of all parts, each of which writes its own."""
    x_MH = x_TH.new_empty(num_rows, x_TH.shape[1]) if wants_x else None
    factors = tuple(None if tensor is None else torch.empty_like(tensor) for tensor in tensors)
    return _Gradients(x_MH, x_TH.new_empty(num_rows), factors)


def _forward_part(x_TH: Tensor, part: _Part, out_MH: Tensor | None) -> tuple[Tensor, _Kept]:
    ops, rows = part.base.ops, part.rows
    x_MH = x_TH.index_select(0, rows.token_of_M)
    gate_up = part.base.w13.forward(x_MH, rows.counts_E)
    shrunk13 = shrunk2 = None
    if part.first is not None:
        shrunk13 = part.first.shrink(x_MH)
        part.first.expand_add_(gate_up, shrunk13)
    del x_MH
    inner_MI = ops.swiglu(gate_up).mul_(part.gates)
    y_MH = part.base.w2.forward(inner_MI, rows.counts_E, out_MH)
    if part.second is not None:
        shrunk2 = part.second.shrink(inner_MI)
        part.second.expand_add_(y_MH, shrunk2)
    return y_MH, _Kept(gate_up, shrunk13, shrunk2)


def _backward_part(
    x_TH: Tensor, grad_out_TH: Tensor, part: _Part, kept: _Kept, whole: _Gradients | None, *, wants_x: bool
) -> _Gradients:
    """A part's gradients, written to its place in `whole` if there is one."""
    base, ops, rows = part.base, part.base.ops, part.rows
    grad_y_MH = grad_out_TH.index_select(0, rows.token_of_M)
    grad_inner = base.w2.backward(grad_y_MH, rows.counts_E)
    inner = ops.swiglu(kept.gate_up)
    grads2: tuple[Tensor | None, ...] = (None, None)
    if part.second is not None and kept.shrunk2 is not None:
        grads2 = part.second.backward(grad_y_MH, inner * part.gates, kept.shrunk2, grad_inner)
    del grad_y_MH
    grad_gates = torch.linalg.vecdot(inner, grad_inner)
    del inner
    grad_gate_up = ops.swiglu_backward(kept.gate_up, grad_inner.mul_(part.gates))
    del grad_inner
    grad_x_MH = None
    if wants_x:  # below the first adapted layer nothing does, and the largest product of all is left out
        out_MH = None if whole is None or whole.x is None else whole.x[part.span]
        grad_x_MH = base.w13.backward(grad_gate_up, rows.counts_E, out_MH)
    grads13: tuple[Tensor | None, ...] = (None, None)
    if part.first is not None and kept.shrunk13 is not None:
        x_MH = x_TH.index_select(0, rows.token_of_M)
        grads13 = part.first.backward(grad_gate_up, x_MH, kept.shrunk13, grad_x_MH)
    own = _Gradients(grad_x_MH, grad_gates, (*grads13, *grads2))
    if whole is not None:
        whole.gates[part.span] = own.gates
        for target, factor in zip(whole.factors, own.factors, strict=True):
            if target is not None and factor is not None:
                target[part.adapted] = factor
    return own


def _parts(
    x_TH: Tensor,
    gates_M: Tensor,
    tensors: Sequence[Tensor],
    base: BaseExperts,
    factors: ExpertFactors | None,
    rows: ExpertRows,
) -> list[_Part]:
    """The parts that the device computes side by side; one alone is everything."""
    parts = []
    for experts, span in base.ops.shares(rows.counts_E):
        own_base = BaseExperts(base.w13[experts], base.w2[experts], base.ops)
        own_rows, adapted = rows_of_part(rows, experts, span)
        own_tensors = [tensor if tensor is None else tensor[adapted] for tensor in tensors]
        first, second = _both(own_tensors, base, factors, own_rows, x_TH.dtype)
        gates_M1 = gates_M[span, None].to(x_TH.dtype)
        parts.append(_Part(own_base, own_rows, span, adapted, gates_M1, first, second))
    return parts


def _both(
    tensors: Sequence[Tensor], base: BaseExperts, factors: ExpertFactors | None, rows: ExpertRows, dtype: torch.dtype
) -> tuple[_Adapted | None, _Adapted | None]:
    if factors is None:
        return None, None
    a13, b13, a2, b2 = tensors
    like = _Like(base.ops, dtype)
    first = _Adapted(a13, b13, factors.scale13, factors.dropout13, rows, like)
    return first, _Adapted(a2, b2, factors.scale2, factors.dropout2, rows, like)


def _transposed(weight_GNK: Tensor) -> Tensor:
    """[G, N, K] as on disk -> one panel [G, 1, K, N], a view."""
    return weight_GNK.transpose(1, 2)[:, None]


def _sum_of_places(y_MH: Tensor, rows: ExpertRows, ops: Ops) -> Tensor:
    """Each input row's sum over its routed rows, in float32; place M adds nothing."""
    if rows.has_absent:
        y_MH = torch.cat((y_MH, y_MH.new_zeros(1, y_MH.shape[1])))
    return ops.sum_rows(y_MH, rows.places_TK)
