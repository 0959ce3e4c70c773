"""The router's choice, sorting rows by key, the sum over a token's experts; shape suffixes as in `base.py`."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from runtime.ops import reference_routing
from runtime.ops.routing import RoutingRule, SortedRows
from runtime.ops.told import tell_once

MAX_EXPERTS = 2048
GROUP_ALIGNMENT = 32
MAX_KEYS = 10_240
_NO_QUANTISATION = -1
_COUNTS = 1
_ROW_OF_CHOICE = 0
_BY_TOKEN = 2  # of `drop_pad_mode`: nothing is dropped, and a token's choices follow each other


def choose_experts(logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """`Ops.choose_experts`; experts are int32."""
    problem = gating_problem(logits_TE.shape[1], rule)
    if problem is not None:
        tell_once("npu_moe_gating_top_k", problem)
        return reference_routing.choose_experts(logits_TE, bias_E, rule)
    weights_TK, experts_TK, _ = torch_npu.npu_moe_gating_top_k(
        logits_TE,
        rule.num_chosen,
        bias=bias_E,
        k_group=rule.num_kept_groups,
        group_count=rule.num_groups,
        group_select_mode=1 if rule.group_score == "best two" and rule.num_groups > 1 else 0,
        norm_type=1 if rule.scoring == "sigmoid" else 0,
        routed_scaling_factor=rule.scale,
    )
    return weights_TK, experts_TK


def gating_problem(num_experts: int, rule: RoutingRule) -> str | None:
    """What the operator cannot express of a rule, None if it can.

    It leaves groups that are not kept out by minus infinity. V2 marks them by zero, which is the same choice: softmax
    scores are positive.
    """
    in_group = num_experts // rule.num_groups
    aligned = -(-in_group // GROUP_ALIGNMENT) * GROUP_ALIGNMENT * rule.num_groups
    if rule.renormalise != (rule.scoring == "sigmoid"):
        return f"{rule.scoring} scores {'with' if rule.renormalise else 'without'} renormalised weights"
    if in_group <= 2:
        return f"{in_group} experts a group, where it needs 3 or more"
    if num_experts > MAX_EXPERTS or aligned > MAX_EXPERTS:
        return f"{num_experts} experts, {aligned} with groups rounded up to 32, where it takes {MAX_EXPERTS}"
    return None


def sort_rows(x_TH: Tensor, keys_TK: Tensor, num_keys: int) -> SortedRows:
    """`Ops.sort_rows`."""
    if num_keys > MAX_KEYS:
        problem = f"{num_keys} keys (experts x adapters of a step), where it takes {MAX_KEYS}"
        tell_once("npu_moe_init_routing_v2", problem)
        return _sorted_without_operator(x_TH, keys_TK, num_keys)
    x_MH, to_M, counts_G, _ = torch_npu.npu_moe_init_routing_v2(
        x_TH.contiguous(),
        keys_TK.int().contiguous(),
        active_num=keys_TK.numel(),
        expert_num=num_keys,
        drop_pad_mode=0,
        expert_tokens_num_type=_COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=_NO_QUANTISATION,
        active_expert_range=[0, num_keys],
        row_idx_type=_ROW_OF_CHOICE,
    )
    return SortedRows(x_MH, counts_G, to_M=to_M)


def _sorted_without_operator(x_TH: Tensor, keys_TK: Tensor, num_keys: int) -> SortedRows:
    """As the reference, but bincount would wait for the device."""
    sorted_M, order_M = keys_TK.flatten().sort(stable=True)
    x_MH = x_TH.index_select(0, order_M.div(keys_TK.shape[1], rounding_mode="floor"))
    keys_G = torch.arange(num_keys, dtype=keys_TK.dtype, device=keys_TK.device)
    ends_G = torch.searchsorted(sorted_M, keys_G, right=True)
    return SortedRows(x_MH, ends_G.diff(prepend=ends_G.new_zeros(1)), from_M=order_M)


def combine_experts(y_MN: Tensor, rows: SortedRows, weights_TE: Tensor) -> Tensor:
    """`Ops.combine_experts`; the operator wants the weights in the rows' dtype."""
    sum_TN: Tensor = torch_npu.npu_moe_finalize_routing(
        y_MN.contiguous(),
        None,
        None,
        None,
        weights_TE.to(y_MN.dtype),
        rows.places_M.int(),
        None,
        drop_pad_mode=_BY_TOKEN,
    )
    return sum_TN
