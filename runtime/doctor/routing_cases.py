"""The router's choice, sorting rows by key, the sum over a token's experts; suffixes as in `runtime/ops/base.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from runtime.doctor.case import Case, Exact, Prepared, Results, Source, described, num_bytes
from runtime.doctor.shapes import Shapes
from runtime.ops import reference, reference_routing
from runtime.ops.base import Ops
from runtime.ops.routing import RoutingRule, SortedRows

Choose = Callable[[Tensor, Tensor, RoutingRule], tuple[Tensor, Tensor]]


def routing_cases() -> list[Case]:
    """Of `choose_experts`, `sort_rows`, `combine_experts` and `sum_rows`."""
    phases = ("decode", "prefill")
    found = [
        Case("choose_experts", phase, partial(_choose_experts, phase=phase), dtype=torch.float32) for phase in phases
    ]
    found += [Case("sort_rows", phase, partial(_sort_rows, phase=phase)) for phase in phases]
    found += [Case("combine_experts", phase, partial(_combine_experts, phase=phase)) for phase in phases]
    return [*found, Case("sum_rows", "training", _sum_rows)]


def _choose_experts(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    rule = RoutingRule(shapes.num_chosen, shapes.num_groups, shapes.num_kept_groups, scale=shapes.routed_scale)
    logits_TE = source.host_normal(shapes.tokens(phase), shapes.num_experts)
    bias_E = source.host_normal(shapes.num_experts).mul_(0.05)

    def dense(choose: Choose, logits: Tensor, bias: Tensor) -> Results:
        """Every expert's weight, zero for one that is not chosen: the order of a token's experts does not count."""
        weights, experts = choose(logits, bias, rule)
        return (torch.zeros_like(logits).scatter_(1, experts.long(), weights),)

    groups = f"{rule.num_kept_groups} of {rule.num_groups} groups"
    return Prepared(
        described(("logits", logits_TE.shape)) + f", {rule.num_chosen} experts of {groups}",
        run=lambda: dense(ops.choose_experts, logits_TE, bias_E),
        reference=lambda exact: dense(reference_routing.choose_experts, exact(logits_TE), exact(bias_E)),
        timed=lambda: ops.choose_experts(logits_TE, bias_E, rule),
        moved_bytes=num_bytes(logits_TE, bias_E) + len(logits_TE) * rule.num_chosen * 8,
        workspace_bytes=6 * num_bytes(logits_TE),
    )


def _distinct_choices(shapes: Shapes, source: Source, num_tokens: int) -> Tensor:
    """Experts [T, K] of each token on the host, no expert twice."""
    scores = torch.rand(num_tokens, shapes.num_experts, generator=source.host)
    return scores.topk(shapes.num_chosen).indices


def _sort_rows(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    num_tokens, keys_of_expert = shapes.tokens(phase), shapes.num_adapters + 1
    experts_TK = _distinct_choices(shapes, source, num_tokens)
    slots_T = torch.randint(keys_of_expert, (num_tokens, 1), generator=source.host)
    keys_TK = source.place(experts_TK * keys_of_expert + slots_T)
    num_keys = shapes.num_experts * keys_of_expert
    x_TH = source.normal(num_tokens, shapes.hidden)

    def results(rows: SortedRows) -> Results:
        return rows.x_MH, rows.counts_G, rows.order_M

    return Prepared(
        described(("x", x_TH.shape), ("keys", keys_TK.shape)) + f", {num_keys} keys",
        run=lambda: results(ops.sort_rows(x_TH, keys_TK, num_keys)),
        reference=lambda exact: results(reference_routing.sort_rows(exact(x_TH), exact(keys_TK), num_keys)),
        timed=lambda: ops.sort_rows(x_TH, keys_TK, num_keys),
        moved_bytes=num_bytes(x_TH) * (1 + shapes.num_chosen) + 2 * num_bytes(keys_TK),
        workspace_bytes=16 * x_TH.numel() * shapes.num_chosen,
        is_copy=True,
    )


def _sum_rows(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    """The rows of each token's experts, which were computed in another order."""
    num_tokens = shapes.prefill_tokens
    num_rows = num_tokens * shapes.num_chosen
    places_TE = source.place(torch.randperm(num_rows, generator=source.host).view(num_tokens, -1))
    y_MN = source.normal(num_rows, shapes.hidden)
    return Prepared(
        described(("y", y_MN.shape), ("places", places_TE.shape)),
        run=lambda: (ops.sum_rows(y_MN, places_TE),),
        reference=lambda exact: (reference.sum_rows(exact(y_MN), exact(places_TE)),),
        moved_bytes=num_bytes(y_MN, places_TE) + num_bytes(y_MN) // shapes.num_chosen,
        flops=y_MN.numel(),
        workspace_bytes=16 * y_MN.numel(),
    )


def _combine_experts(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    num_tokens = shapes.tokens(phase)
    num_rows = num_tokens * shapes.num_chosen
    order_M = source.place(torch.randperm(num_rows, generator=source.host))
    weights = torch.rand(num_tokens, shapes.num_chosen, generator=source.host)
    weights_TE = source.place(weights / weights.sum(1, keepdim=True) * shapes.routed_scale)
    y_MN = source.normal(num_rows, shapes.hidden)
    rows = SortedRows(y_MN, order_M.new_zeros(0), from_M=order_M)

    def expected(exact: Exact) -> Results:
        placed = SortedRows(exact(y_MN), order_M.new_zeros(0), from_M=exact(order_M))
        return (reference.combine_experts(exact(y_MN), placed, exact(weights_TE)),)

    return Prepared(
        described(("y", y_MN.shape), ("weights", weights_TE.shape)),
        run=lambda: (ops.combine_experts(y_MN, rows, weights_TE),),
        reference=expected,
        moved_bytes=num_bytes(y_MN, weights_TE, order_M) + num_bytes(y_MN) // shapes.num_chosen,
        flops=2 * y_MN.numel(),
        workspace_bytes=16 * y_MN.numel(),
    )
