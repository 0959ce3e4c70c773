"""The router and the sorting of rows: npu_moe_gating_top_k, npu_moe_init_routing_v2, npu_moe_finalize_routing.

Shape suffixes: T tokens, E experts, K chosen experts of a token, H hidden width.
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
    require_contiguous,
    require_dtype,
    require_one_of,
    require_rank,
    require_same_dtype,
    require_shape,
)
from tests.npu.bench.registry import kernel

GATING = "npu_moe_gating_top_k"
INIT = "npu_moe_init_routing_v2"
FINALIZE = "npu_moe_finalize_routing"
MAX_EXPERTS_OF_ROUTER = 2048
MAX_EXPERTS_OF_ROUTING = 10240


@kernel(GATING)
def gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, input_ids: Tensor | None = None, tid2eid: Tensor | None = None,
    k_group: int = 1, group_count: int = 1, group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0,
    out_flag: bool = False, routed_scaling_factor: float = 1.0, eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T, K] in x's type, experts [T, K] int32, all scores [T, E] float32 (only with `out_flag`)."""
    refuse_unmodelled(GATING, input_ids=input_ids, tid2eid=tid2eid)
    _require_gating(x, k, bias, k_group, group_count)
    require_one_of(GATING, "group_select_mode", group_select_mode, (0, 1))
    require_one_of(GATING, "renorm", renorm, (0,))
    require_one_of(GATING, "norm_type", norm_type, (0, 1))
    scores_TE = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    choice_TE = scores_TE if bias is None else scores_TE + bias.float()
    by_group = choice_TE.unflatten(1, (group_count, -1))
    best = by_group.topk(2, dim=-1).values.sum(-1) if group_select_mode == 1 else by_group.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _largest(best, k_group), True)
    # Experts of groups that are not kept get minus infinity; other implementations give them zero.
    choice_TE = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    experts_TK = _largest(choice_TE, k)
    weights_TK = scores_TE.gather(1, experts_TK)
    if norm_type == 1:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + eps)
    all_scores = scores_TE if out_flag else poison(scores_TE.shape, torch.float32)
    return (weights_TK * routed_scaling_factor).to(x.dtype), experts_TK.int(), all_scores


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest, in descending order, the lower index first among equals."""
    return values.argsort(dim=-1, descending=True, stable=True)[..., :count]


def _require_gating(x: Tensor, k: int, bias: Tensor | None, k_group: int, group_count: int) -> None:
    require_dtype(GATING, "x", x, FLOATS)
    require_rank(GATING, "x", x, 2)
    num_experts = x.shape[1]
    require(num_experts <= MAX_EXPERTS_OF_ROUTER, GATING, "experts", num_experts,
            f"<= {MAX_EXPERTS_OF_ROUTER} are possible")
    if bias is not None:
        require_same_dtype(GATING, "bias", bias, "x", x)
        require_shape(GATING, "bias", bias, [num_experts])
    require(group_count > 0 and num_experts % group_count == 0, GATING, "group_count", group_count,
            f"it must divide the {num_experts} experts")
    in_group = num_experts // group_count
    require(in_group > 2, GATING, "experts of a group", in_group, "there must be more than 2")
    aligned = -(-in_group // 32) * 32 * group_count
    require(aligned <= MAX_EXPERTS_OF_ROUTER, GATING, "experts, groups aligned to 32", aligned,
            f"it must be <= {MAX_EXPERTS_OF_ROUTER}")
    require(1 <= k_group <= group_count, GATING, "k_group", k_group, f"it must lie in 1..{group_count}")
    require(1 <= k <= in_group * k_group, GATING, "k", k, f"it must lie in 1..{in_group * k_group}")


@kernel(INIT)
def init_routing(
    x: Tensor, expert_idx: Tensor, *, scale: Tensor | None = None, offset: Tensor | None = None, active_num: int = -1,
    expert_capacity: int = -1, expert_num: int = -1, drop_pad_mode: int = 0, expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False, quant_mode: int = -1, active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0, x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert [T K, H], row index [T K] int32, rows per active expert int64, scales (meaningless here).

    Rows past those of the active experts, and their entries of a scatter index, are not written.
    """
    refuse_unmodelled(INIT, scale=scale, offset=offset, x_dtype=x_dtype)
    _require_routing(x, expert_idx, expert_num, active_num, expert_tokens_num_flag)
    require_one_of(INIT, "drop_pad_mode", drop_pad_mode, (0,))
    require_one_of(INIT, "quant_mode", quant_mode, (-1,))
    require_one_of(INIT, "expert_tokens_num_type", expert_tokens_num_type, (0, 1))
    require_one_of(INIT, "row_idx_type", row_idx_type, (0, 1))
    start, end = active_expert_range or (0, expert_num)
    require(0 <= start < end <= expert_num, INIT, "active_expert_range", [start, end],
            f"it must be a range of the {expert_num} experts")
    chosen = expert_idx.flatten().long()
    order = torch.where((chosen >= start) & (chosen < end), chosen, expert_num).argsort(stable=True)
    counts = torch.bincount(chosen, minlength=expert_num)[start:end]
    num_active = int(counts.sum())
    rows = poison((len(chosen), x.shape[1]), x.dtype)
    rows[:num_active] = x[order[:num_active] // expert_idx.shape[1]]
    if row_idx_type == 1:
        index = poison((len(chosen),), torch.int32)
        index[:num_active] = order[:num_active].int()
    else:
        index = torch.full((len(chosen),), -1, dtype=torch.int32)
        index[order[:num_active]] = torch.arange(num_active, dtype=torch.int32)
    counted = counts.cumsum(0) if expert_tokens_num_type == 0 else counts
    return rows, index, counted, poison((len(chosen),), torch.float32)


def _require_routing(x: Tensor, expert_idx: Tensor, expert_num: int, active_num: int, wants_counts: bool) -> None:
    require_dtype(INIT, "x", x, FLOATS)
    require_rank(INIT, "x", x, 2)
    require_contiguous(INIT, "x", x)
    require_dtype(INIT, "expert_idx", expert_idx, (torch.int32,))
    require_rank(INIT, "expert_idx", expert_idx, 2)
    require_contiguous(INIT, "expert_idx", expert_idx)
    require(len(x) == len(expert_idx), INIT, "expert_idx.shape", list(expert_idx.shape), f"x is {list(x.shape)}")
    require(0 < expert_num <= MAX_EXPERTS_OF_ROUTING, INIT, "expert_num", expert_num,
            f"it must lie in 1..{MAX_EXPERTS_OF_ROUTING}")
    # Older releases accept nothing else than all choices, and counts that are asked for.
    require(active_num == expert_idx.numel(), INIT, "active_num", active_num, f"it must be T K = {expert_idx.numel()}")
    require(wants_counts, INIT, "expert_tokens_num_flag", wants_counts, "it must be True")
    if expert_idx.numel():
        low, high = int(expert_idx.min()), int(expert_idx.max())
        require(low >= 0 and high < expert_num, INIT, "expert_idx", f"{low}..{high}", f"ids lie in 0..{expert_num - 1}")


@kernel(FINALIZE)
def finalize_routing(
    expanded_permuted_rows: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None,
    scales: Tensor | None, expanded_src_to_dst_row: Tensor, export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0, k: int | None = 1,
) -> Tensor:
    """Each token's weighted sum of its rows [T, H], summed in float32 in the order of its choices, plus the skips.

    Modes 2 and 3 read the index as T x K, 0 and 1 as K x T; 1 and 3 take rows [E, C, H] and allow -1 for no row.
    """
    refuse_unmodelled(FINALIZE, bias=bias, export_for_source_row=export_for_source_row)
    require_one_of(FINALIZE, "drop_pad_mode", drop_pad_mode, (0, 1, 2, 3))
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    require_dtype(FINALIZE, "expanded_permuted_rows", rows, FLOATS)
    may_drop = drop_pad_mode in (1, 3)
    require_rank(FINALIZE, "expanded_permuted_rows", rows, 3 if may_drop else 2)
    require_contiguous(FINALIZE, "expanded_permuted_rows", rows)
    require_dtype(FINALIZE, "expanded_src_to_dst_row", index, (torch.int32,))
    require_rank(FINALIZE, "expanded_src_to_dst_row", index, 1)
    num_chosen = _chosen(rows, scales, k)
    require(len(index) % num_chosen == 0, FINALIZE, "len(expanded_src_to_dst_row)", len(index),
            f"it is T K, K = {num_chosen}")
    num_tokens = len(index) // num_chosen
    require(not may_drop or rows.shape[0] >= num_chosen, FINALIZE, "E", rows.shape[0],
            f"it must be >= K = {num_chosen}")
    require(may_drop or len(rows) == len(index), FINALIZE, "rows", len(rows), f"they must be T K = {len(index)}")
    flat = rows.flatten(0, -2)
    lowest = -1 if may_drop else 0
    if len(index):
        require(int(index.min()) >= lowest and int(index.max()) < len(flat), FINALIZE, "expanded_src_to_dst_row",
                f"{int(index.min())}..{int(index.max())}", f"mode {drop_pad_mode} takes {lowest}..{len(flat) - 1}")
    by_token = index.view(num_tokens, num_chosen) if drop_pad_mode in (2, 3) else index.view(num_chosen, num_tokens).T
    taken = flat[by_token.clamp(min=0).long()].float().masked_fill((by_token < 0)[..., None], 0)
    if scales is not None:
        require_shape(FINALIZE, "scales", scales, [num_tokens, num_chosen])
        taken = taken * scales.float()[..., None]
    return _with_skips(taken.sum(1), rows, skip1, skip2)


def _chosen(rows: Tensor, scales: Tensor | None, k: int | None) -> int:
    if scales is None:
        require(k is not None and k >= 1, FINALIZE, "k", k, "it must be given where scales are not")
        return k or 1
    require_rank(FINALIZE, "scales", scales, 2)
    require_same_dtype(FINALIZE, "scales", scales, "expanded_permuted_rows", rows)
    return scales.shape[1]


def _with_skips(summed_TH: Tensor, rows: Tensor, skip1: Tensor | None, skip2: Tensor | None) -> Tensor:
    require(skip2 is None or skip1 is not None, FINALIZE, "skip2", "given", "it goes with skip1 only")
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            require_same_dtype(FINALIZE, name, skip, "expanded_permuted_rows", rows)
            require_shape(FINALIZE, name, skip, summed_TH.shape)
            summed_TH = summed_TH + skip.float()
    return summed_TH.to(rows.dtype)
