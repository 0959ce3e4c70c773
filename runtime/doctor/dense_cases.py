"""Dense products, norms and the gated activation; suffixes as in `runtime/ops/base.py`."""

from __future__ import annotations

from functools import cache, partial

from torch import Tensor

from runtime.doctor.case import Case, Prepared, Source, described, num_bytes
from runtime.doctor.shapes import Shapes
from runtime.ops import reference
from runtime.ops.base import Ops

EPS = 1e-6


def dense_cases() -> list[Case]:
    """Of `linear` with `pack_linear`, `rms_norm`, `add_rms_norm`, `swiglu` and `swiglu_backward`."""
    found = []
    for phase in ("decode", "prefill"):
        found += [
            Case("linear", phase, partial(_linear, phase=phase), also=("pack_linear",)),
            Case("rms_norm", phase, partial(_rms_norm, phase=phase)),
            Case("add_rms_norm", phase, partial(_add_rms_norm, phase=phase)),
            Case("swiglu", phase, partial(_swiglu, phase=phase)),
        ]
    return [*found, Case("swiglu_backward", "training", _swiglu_backward)]


def _linear(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    """The output projection of attention."""
    num_k, num_n = shapes.num_heads * shapes.value, shapes.hidden
    x_TK = source.normal(shapes.tokens(phase), num_k)
    weight_NK = source.normal(num_n, num_k, scale=num_k**-0.5)

    @cache
    def packed() -> Tensor:
        return ops.pack_linear(weight_NK)

    return Prepared(
        described(("x", x_TK.shape), ("weight", weight_NK.shape)),
        run=lambda: (ops.linear(x_TK, packed()),),
        reference=lambda exact: (exact(x_TK) @ exact(weight_NK).T,),
        moved_bytes=num_bytes(x_TK, weight_NK) + len(x_TK) * num_n * x_TK.element_size(),
        flops=2 * x_TK.numel() * num_n,
        workspace_bytes=num_bytes(weight_NK) + 8 * len(x_TK) * num_n,
    )


def _rms_norm(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    x_TN, weight_N = source.normal(shapes.tokens(phase), shapes.hidden), source.normal(shapes.hidden)
    return Prepared(
        described(("x", x_TN.shape)),
        run=lambda: (ops.rms_norm(x_TN, weight_N, EPS),),
        reference=lambda exact: (reference.rms_norm(exact(x_TN), exact(weight_N), EPS),),
        moved_bytes=2 * num_bytes(x_TN) + num_bytes(weight_N),
        workspace_bytes=8 * x_TN.numel(),
    )


def _add_rms_norm(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    x_TN, residual_TN = (source.normal(shapes.tokens(phase), shapes.hidden) for _ in range(2))
    weight_N = source.normal(shapes.hidden)
    return Prepared(
        described(("x", x_TN.shape), ("residual", residual_TN.shape)),
        run=lambda: ops.add_rms_norm(x_TN, residual_TN, weight_N, EPS),
        reference=lambda exact: reference.add_rms_norm(exact(x_TN), exact(residual_TN), exact(weight_N), EPS),
        moved_bytes=4 * num_bytes(x_TN) + num_bytes(weight_N),
        workspace_bytes=16 * x_TN.numel(),
    )


def _swiglu(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    num_rows = shapes.routed_rows(shapes.tokens(phase))
    x_T2N = source.normal(num_rows, 2 * shapes.expert_width)
    return Prepared(
        described(("x", x_T2N.shape)),
        run=lambda: (ops.swiglu(x_T2N),),
        reference=lambda exact: (reference.swiglu(exact(x_T2N)),),
        moved_bytes=num_bytes(x_T2N) * 3 // 2,
        workspace_bytes=8 * x_T2N.numel(),
    )


def _swiglu_backward(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    num_rows = shapes.routed_rows(shapes.prefill_tokens)
    x_T2N, grad_TN = source.normal(num_rows, 2 * shapes.expert_width), source.normal(num_rows, shapes.expert_width)
    return Prepared(
        described(("x", x_T2N.shape), ("gradient", grad_TN.shape)),
        run=lambda: (ops.swiglu_backward(x_T2N, grad_TN),),
        reference=lambda exact: (reference.swiglu_backward(exact(x_T2N), exact(grad_TN)),),
        moved_bytes=2 * num_bytes(x_T2N) + num_bytes(grad_TN),
        workspace_bytes=20 * x_T2N.numel(),
    )
