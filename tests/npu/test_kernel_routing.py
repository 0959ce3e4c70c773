"""The router's and the rows' operators on the bench, against what their documents say in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.npu.real_meta import run_as_meta_says

POISON = torch.iinfo(torch.int32).min


def routed(x: Tensor, experts: Tensor, num_experts: int, **options: object) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = run_as_meta_says(
        "npu_moe_init_routing_v2", x, experts, active_num=experts.numel(), expert_num=num_experts,
        expert_tokens_num_flag=True, **options,
    )
    return result


def test_deepseek_v3s_router_is_sigmoid_with_bias_limited_to_groups_and_renormalised() -> None:
    torch.manual_seed(0)
    # A bias that makes every score negative shows whether experts of other groups lose to all, or count as zero.
    logits, bias = torch.randn(64, 256), torch.randn(256) * 0.1 - 2
    weights, experts, _ = run_as_meta_says(
        "npu_moe_gating_top_k", logits, 8, bias=bias, k_group=4, group_count=8, group_select_mode=1, norm_type=1,
        routed_scaling_factor=2.5,
    )
    for row in range(64):
        scores = torch.sigmoid(logits[row])
        biased = scores + bias
        groups = biased.view(8, 32).topk(2).values.sum(1).topk(4).indices.tolist()
        allowed = [expert for expert in range(256) if expert // 32 in groups]
        best = sorted(allowed, key=lambda expert: -float(biased[expert]))[:8]
        assert experts[row].tolist() == best
        torch.testing.assert_close(weights[row], scores[best] / scores[best].sum() * 2.5)


def test_softmax_weights_are_not_renormalised_and_groups_count_by_their_best_expert() -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 64)
    weights, experts, scores = run_as_meta_says(
        "npu_moe_gating_top_k", logits, 6, k_group=3, group_count=8, norm_type=0, out_flag=True,
        routed_scaling_factor=16.0,
    )
    for row, probabilities in enumerate(logits.softmax(-1)):
        groups = probabilities.view(8, 8).amax(1).topk(3).indices.tolist()
        best = sorted((e for e in range(64) if e // 8 in groups), key=lambda e: -float(probabilities[e]))[:6]
        assert experts[row].tolist() == best
        torch.testing.assert_close(weights[row], probabilities[best] * 16)
    torch.testing.assert_close(scores, logits.softmax(-1))


def test_scores_that_were_not_asked_for_are_nan() -> None:
    _, _, scores = run_as_meta_says("npu_moe_gating_top_k", torch.randn(2, 16), 2)
    assert scores.isnan().all()


@pytest.mark.parametrize("row_idx_type", [0, 1])
@pytest.mark.parametrize("num_type", [0, 1])
def test_rows_are_sorted_by_expert_in_the_order_of_the_tokens(row_idx_type: int, num_type: int) -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(20, 8), torch.randint(0, 6, (20, 3), dtype=torch.int32)
    rows, index, counts, _ = routed(x, experts, 6, row_idx_type=row_idx_type, expert_tokens_num_type=num_type)
    places = sorted(range(60), key=lambda place: (int(experts.flatten()[place]), place))
    torch.testing.assert_close(rows, x[[place // 3 for place in places]], rtol=0, atol=0)
    listed = index.tolist() if row_idx_type == 1 else sorted(range(60), key=index.tolist().__getitem__)
    assert listed == places
    per_expert = torch.tensor([int((experts == expert).sum()) for expert in range(6)])
    assert counts.tolist() == (per_expert.cumsum(0) if num_type == 0 else per_expert).tolist()


def test_other_ranks_experts_leave_rows_uninitialised_and_no_index() -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(20, 8), torch.randint(0, 16, (20, 2), dtype=torch.int32)
    rows, gather, counts, _ = routed(x, experts, 16, active_expert_range=[4, 8], expert_tokens_num_type=1)
    local = (experts >= 4) & (experts < 8)
    num_local = int(local.sum())
    assert 0 < num_local < 40 and int(counts.sum()) == num_local
    assert not rows[:num_local].isnan().any() and rows[num_local:].isnan().all()
    assert ((gather >= 0) == local.flatten()).all()
    torch.testing.assert_close(rows[gather[local.flatten()].long()], x.repeat_interleave(2, 0)[local.flatten()])
    scatter = routed(x, experts, 16, active_expert_range=[4, 8], expert_tokens_num_type=1, row_idx_type=1)[1]
    assert (scatter[num_local:] == POISON).all() and (scatter[:num_local] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finalize_routing_weighs_each_tokens_rows_and_adds_the_shared_output(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(20, 8).to(dtype), torch.randint(0, 6, (20, 3), dtype=torch.int32)
    scales, shared = torch.rand(20, 3).to(dtype), torch.randn(20, 8).to(dtype)
    rows, index, _, _ = routed(x, experts, 6, expert_tokens_num_type=1)
    out = run_as_meta_says("npu_moe_finalize_routing", rows, shared, None, None, scales, index, None, drop_pad_mode=2)
    wanted = shared.float() + (scales.float()[..., None] * x.float()[:, None]).sum(1)
    torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_dropping_mode_counts_index_minus_one_as_no_row() -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(20, 8), torch.randint(0, 16, (20, 2), dtype=torch.int32)
    rows, index, _, _ = routed(x, experts, 16, active_expert_range=[4, 8], expert_tokens_num_type=1)
    scales = torch.rand(20, 2)
    out = run_as_meta_says("npu_moe_finalize_routing", rows.view(2, 20, 8), None, None, None, scales, index, None,
                           drop_pad_mode=3)
    local = (experts >= 4) & (experts < 8)
    torch.testing.assert_close(out, (scales * local)[..., None].mul(x[:, None]).sum(1))
    by_column = index.view(20, 2).T.flatten().contiguous()
    again = run_as_meta_says("npu_moe_finalize_routing", rows.view(2, 20, 8), None, None, None, scales, by_column, None,
                             drop_pad_mode=1)
    torch.testing.assert_close(again, out, rtol=0, atol=0)
