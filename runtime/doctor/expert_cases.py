"""Grouped products of routed experts and of their LoRA, in the layouts of the server and of the trainer.

Shape suffixes as in `runtime/ops/base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate

import torch
from torch import Tensor

from runtime.doctor.case import Case, Exact, Prepared, Results, Source, described, num_bytes
from runtime.doctor.shapes import Shapes
from runtime.ops import reference
from runtime.ops.base import Ops
from runtime.ops.frozen_groups import FrozenGroups
from runtime.ops.lora_rows import LoraRows


def expert_cases() -> list[Case]:
    """Of `grouped_matmul`, `pack_groups`, `grouped_matmul_add_`, `grouped_outer` and `lora_add_`."""
    return [
        Case("grouped_matmul", "decode, gate and up", partial(_base_product, phase="decode", side="gate_up")),
        Case("grouped_matmul", "prefill, gate and up", partial(_base_product, phase="prefill", side="gate_up")),
        Case("grouped_matmul", "prefill, down", partial(_base_product, phase="prefill", side="down")),
        Case("grouped_matmul", "decode, all experts", _all_experts, full_size_only=True),
        Case("grouped_matmul", "training, weights as on disk", _transposed_product),
        Case("pack_groups", "training, forward", partial(_packed_product, is_forward=True)),
        Case("pack_groups", "training, gradient of x", partial(_packed_product, is_forward=False)),
        Case("grouped_matmul_add_", "training, expand", _expand_add),
        Case("grouped_outer", "training, gradient of B", partial(_outer, of_b=True)),
        Case("grouped_outer", "training, gradient of A", partial(_outer, of_b=False)),
        Case("lora_add_", "decode, gate and up", partial(_lora_add, phase="decode", side="gate_up")),
        Case("lora_add_", "prefill, gate and up", partial(_lora_add, phase="prefill", side="gate_up")),
        Case("lora_add_", "prefill, down", partial(_lora_add, phase="prefill", side="down")),
    ]


def _widths(shapes: Shapes, side: str) -> tuple[int, int, int]:
    """Inputs, outputs and parts of a projection."""
    if side == "gate_up":
        return shapes.hidden, 2 * shapes.expert_width, 2
    return shapes.expert_width, shapes.hidden, 1


def _base_product(shapes: Shapes, ops: Ops, source: Source, *, phase: str, side: str) -> Prepared:
    num_rows, num_groups = shapes.routed_rows(shapes.tokens(phase)), shapes.num_local_experts
    return _server_product(shapes, ops, source, num_rows, num_groups, side)


def _all_experts(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    num_rows = shapes.decode_tokens * shapes.num_chosen
    return _server_product(shapes, ops, source, num_rows, shapes.num_experts, "gate_up")


def _server_product(
    shapes: Shapes, ops: Ops, source: Source, num_rows: int, num_groups: int, side: str
) -> Prepared:
    num_k, num_n, parts = _widths(shapes, side)
    columns = ops.panel_columns(num_n, parts)
    weight = source.normal(
        num_groups, num_n // columns, num_k, columns, scale=num_k**-0.5, parts=num_groups
    )
    return _product(ops, source, source.normal(num_rows, num_k), weight)


def _transposed_product(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    num_k, num_n, _ = _widths(shapes, "gate_up")
    num_groups = shapes.num_local_experts
    weight = source.normal(num_groups, num_n, num_k, scale=num_k**-0.5, parts=num_groups)
    x_MK = source.normal(shapes.routed_rows(shapes.prefill_tokens), num_k)
    return _product(ops, source, x_MK, weight.transpose(1, 2)[:, None])


def _product(ops: Ops, source: Source, x_MK: Tensor, weight_GJKW: Tensor) -> Prepared:
    counts = source.spread(x_MK.shape[0], weight_GJKW.shape[0])
    counts_G = source.place(torch.tensor(counts))
    num_n = weight_GJKW.shape[1] * weight_GJKW.shape[3]
    num_hit = len(counts) - counts.count(0)
    return Prepared(
        described(("x", x_MK.shape), ("weight", (len(counts), x_MK.shape[1], num_n))) + f", {num_hit} groups with rows",
        run=lambda: (ops.grouped_matmul(x_MK, weight_GJKW, counts_G),),
        reference=lambda exact: (_grouped_reference(exact, x_MK, weight_GJKW, counts),),
        moved_bytes=num_bytes(x_MK) + num_bytes(weight_GJKW[0]) * num_hit + x_MK.element_size() * len(x_MK) * num_n,
        flops=2 * x_MK.numel() * num_n,
        workspace_bytes=8 * len(x_MK) * num_n,
    )


def _packed_product(shapes: Shapes, ops: Ops, source: Source, *, is_forward: bool) -> Prepared:
    """A product by packed weights in one of both directions; packing is not timed."""
    num_k, num_n, _ = _widths(shapes, "gate_up")
    num_rows, num_groups = shapes.routed_rows(shapes.prefill_tokens), shapes.num_local_experts
    weight_GNK = source.normal(num_groups, num_n, num_k, scale=num_k**-0.5, parts=num_groups)

    @cache
    def packed() -> FrozenGroups:
        return ops.pack_groups(weight_GNK)

    counts = source.spread(num_rows, num_groups)
    counts_G = source.place(torch.tensor(counts))
    x_MK = source.normal(num_rows, num_k if is_forward else num_n)
    plain = (weight_GNK.transpose(1, 2) if is_forward else weight_GNK)[:, None]
    num_hit = len(counts) - counts.count(0)
    return Prepared(
        described(("x", x_MK.shape), ("weight", weight_GNK.shape)) + f", {num_hit} groups with rows",
        run=lambda: (getattr(packed(), "forward" if is_forward else "backward")(x_MK, counts_G),),
        reference=lambda exact: (_grouped_reference(exact, x_MK, plain, counts),),
        moved_bytes=num_bytes(x_MK) + num_bytes(weight_GNK[0]) * num_hit + x_MK.element_size() * num_rows * num_n,
        flops=2 * num_rows * num_k * num_n,
        workspace_bytes=2 * num_bytes(weight_GNK) + 8 * num_rows * max(num_k, num_n),
    )


def _grouped_reference(exact: Exact, x_MK: Tensor, weight_GJKW: Tensor, counts: Sequence[int]) -> Tensor:
    """Group by group, so that one group's weight at a time is held in float32."""
    parts = []
    for group, (stop, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        if count:
            rows, weight = exact(x_MK[stop - count : stop]), exact(weight_GJKW[group : group + 1])
            parts.append(reference.grouped_matmul(rows, weight, torch.tensor([count])))
    return torch.cat(parts)


def _expand_add(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    rank, num_n = _padded_rank(shapes, ops), 2 * shapes.expert_width
    num_rows, num_groups = shapes.routed_rows(shapes.prefill_tokens), shapes.num_local_experts
    counts = source.spread(num_rows, num_groups)
    counts_G = source.place(torch.tensor(counts))
    y_MN, x_MR = source.normal(num_rows, num_n), source.normal(num_rows, rank)
    weight_GNR = source.normal(num_groups, num_n, rank, scale=rank**-0.5)
    weight = weight_GNR.transpose(1, 2)[:, None]
    scratch = y_MN.clone()

    def run() -> Results:
        sum_MN = y_MN.clone()
        ops.grouped_matmul_add_(sum_MN, x_MR, weight, counts_G)
        return (sum_MN,)

    return Prepared(
        described(("y", y_MN.shape), ("x", x_MR.shape), ("weight", (num_groups, rank, num_n))),
        run=run,
        reference=lambda exact: (exact(y_MN) + _grouped_reference(exact, x_MR, weight, counts),),
        timed=lambda: ops.grouped_matmul_add_(scratch, x_MR, weight, counts_G),
        moved_bytes=2 * num_bytes(y_MN) + num_bytes(x_MR, weight_GNR),
        flops=2 * x_MR.numel() * num_n,
        workspace_bytes=16 * y_MN.numel(),
    )


def _outer(shapes: Shapes, ops: Ops, source: Source, *, of_b: bool) -> Prepared:
    rank, num_groups = _padded_rank(shapes, ops), shapes.num_local_experts
    num_rows = shapes.routed_rows(shapes.prefill_tokens)
    left, right = (2 * shapes.expert_width, rank) if of_b else (rank, shapes.hidden)
    x_MK, y_MN = source.normal(num_rows, left), source.normal(num_rows, right)
    counts = torch.tensor(source.spread(num_rows, num_groups))
    counts_G = source.place(counts)
    return Prepared(
        described(("x", x_MK.shape), ("y", y_MN.shape), ("result", (num_groups, left, right))),
        run=lambda: (ops.grouped_outer(x_MK, y_MN, counts_G),),
        reference=lambda exact: (reference.grouped_outer(exact(x_MK), exact(y_MN), counts),),
        moved_bytes=num_bytes(x_MK, y_MN) + 4 * num_groups * left * right,
        flops=2 * x_MK.numel() * right,
        workspace_bytes=12 * num_groups * left * right,
    )


def _padded_rank(shapes: Shapes, ops: Ops) -> int:
    return -(-shapes.lora_rank // ops.lora_rank_multiple) * ops.lora_rank_multiple


@dataclass(frozen=True)
class _PagedRows:
    """Rows sorted by expert and adapter, on the host: each one's page (-1: none)."""

    pages_M: Tensor
    num_pages: int
    num_hit: int

    @classmethod
    def random(cls, shapes: Shapes, source: Source, num_rows: int) -> _PagedRows:
        """Every other local expert is adapted by all adapters; in each, every ninth row or so is of the base."""
        adapted = range(0, shapes.num_local_experts, 2)
        first_page = {expert: index * shapes.num_adapters for index, expert in enumerate(adapted)}
        pages: list[int] = []
        for expert, count in enumerate(source.spread(num_rows, shapes.num_local_experts)):
            if expert not in first_page:
                pages += [-1] * count
                continue
            slots = torch.randint(-1, shapes.num_adapters, (count,), generator=source.host).sort().values.tolist()
            pages += [first_page[expert] + slot if slot >= 0 else -1 for slot in slots]
        pages_M = torch.tensor(pages)
        return cls(pages_M, len(adapted) * shapes.num_adapters, len({page for page in pages if page >= 0}))

    def placed(self, source: Source) -> LoraRows:
        """As the operation is given them; the group list is made on the host, since a step makes it in another way."""
        pages_M, ends_P = source.place(self.pages_M), source.place(self.on_host().ends_P)
        return LoraRows(lambda: pages_M, lambda: ends_P, self.num_pages)

    def on_host(self) -> LoraRows:
        """As the reference is given them."""
        return LoraRows.of_pages(self.pages_M, self.num_pages)


def _lora_add(shapes: Shapes, ops: Ops, source: Source, *, phase: str, side: str) -> Prepared:
    num_k, num_n, parts = _widths(shapes, side)
    rank = _padded_rank(shapes, ops)
    num_rows = shapes.routed_rows(shapes.tokens(phase))
    paged = _PagedRows.random(shapes, source, num_rows)
    lora = paged.placed(source)
    y_MN, x_MK = source.normal(num_rows, num_n), source.normal(num_rows, num_k)
    if ops.lora_a_rows_first:
        a_PKR = source.normal(paged.num_pages, parts * rank, num_k, scale=num_k**-0.5).transpose(1, 2)
    else:
        a_PKR = source.normal(paged.num_pages, num_k, parts * rank, scale=num_k**-0.5)
    bs = [source.normal(paged.num_pages, rank, num_n // parts, scale=rank**-0.5) for _ in range(parts)]
    scratch = y_MN.clone()

    def run() -> Results:
        sum_MN = y_MN.clone()
        ops.lora_add_(sum_MN, x_MK, a_PKR, bs, lora)
        return (sum_MN,)

    def expected(exact: Exact) -> Results:
        sum_MN = exact(y_MN).clone()
        reference.lora_add_(sum_MN, exact(x_MK), exact(a_PKR), [exact(b) for b in bs], paged.on_host())
        return (sum_MN,)

    factor_numbers = paged.num_hit * (num_k * parts * rank + rank * num_n)
    return Prepared(
        described(("y", y_MN.shape), ("x", x_MK.shape), ("A", a_PKR.shape)) + f", {paged.num_hit} pages with rows",
        run=run,
        reference=expected,
        timed=lambda: ops.lora_add_(scratch, x_MK, a_PKR, bs, lora),
        moved_bytes=2 * num_bytes(y_MN) + num_bytes(x_MK) + factor_numbers * x_MK.element_size(),
        flops=2 * num_rows * (num_k * parts * rank + rank * num_n),
        workspace_bytes=16 * y_MN.numel(),
    )
