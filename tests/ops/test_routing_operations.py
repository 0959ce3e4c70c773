"""Choosing experts and sorting their rows, against choices worked out token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.cuda.ops import CudaOps
from runtime.ops.lora_rows import LoraRows
from runtime.ops.routing import RoutingRule, SortedRows

BACK_ENDS = (CpuOps(), CudaOps())
V3 = RoutingRule(4, num_groups=4, num_kept_groups=2, scale=2.5)
RULES = {
    "V3": V3,
    "one group": replace(V3, num_groups=1, num_kept_groups=1),
    "V2": RoutingRule(3, scoring="softmax", renormalise=False, scale=16.0),
    "V2 grouped": RoutingRule(3, 4, 2, scoring="softmax", group_score="best", masked=0.0, renormalise=False),
}


def _names(value: object) -> str:
    return type(value).__name__ if isinstance(value, Ops) else str(value)


with_back_ends = pytest.mark.parametrize("ops", BACK_ENDS, ids=_names)


def chosen_by_hand(logits: torch.Tensor, bias: torch.Tensor | None, rule: RoutingRule) -> dict[int, float]:
    """Expert -> weight of one token, with lists and sorting."""
    scores = (logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)).tolist()
    choice = [score + (0.0 if bias is None else float(bias[expert])) for expert, score in enumerate(scores)]
    size = len(scores) // rule.num_groups
    groups = [list(range(first, first + size)) for first in range(0, len(scores), size)]
    num_best = 1 if rule.group_score == "best" else 2
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:num_best]))
    open_experts = [expert for group in groups[: rule.num_kept_groups] for expert in group]
    best = sorted(open_experts, key=lambda expert: -choice[expert])[: rule.num_chosen]
    total = sum(scores[expert] for expert in best) if rule.renormalise else 1.0
    return {expert: scores[expert] / total * rule.scale for expert in best}


@with_back_ends
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_tokens_choose_the_best_experts_of_the_best_groups(ops: Ops, rule: RoutingRule) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 16)
    bias = torch.randn(16) if rule.scoring == "sigmoid" else None
    weights, experts = ops.choose_experts(logits, bias, rule)
    assert weights.dtype is torch.float32
    for row in range(50):
        expected = chosen_by_hand(logits[row], bias, rule)
        seen = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert seen.keys() == expected.keys()
        assert seen == pytest.approx(expected, rel=1e-5)


@with_back_ends
def test_rows_are_sorted_by_key_and_then_by_token(ops: Ops) -> None:
    torch.manual_seed(1)
    x, keys = torch.randn(20, 6), torch.randint(0, 9, (20, 3))
    keys[keys == 4] = 5  # a key without rows
    rows = ops.sort_rows(x, keys, 11)
    expected = sorted(range(60), key=lambda choice: (int(keys.flatten()[choice]), choice))
    assert rows.order_M.tolist() == expected
    assert [expected.index(choice) for choice in range(60)] == rows.places_M.tolist()
    assert torch.equal(rows.x_MH, x[torch.tensor(expected) // 3])
    assert rows.counts_G.tolist() == [int((keys == key).sum()) for key in range(11)]
    assert rows.counts_G.dtype is torch.int64


def test_the_choices_of_rows_follow_from_the_rows_of_choices() -> None:
    places = torch.randperm(12).int()
    rows = SortedRows(torch.empty(0), torch.empty(0), to_M=places)
    assert torch.equal(rows.order_M[places.long()], torch.arange(12))


def test_rows_without_a_page_are_counted_to_a_neighbour() -> None:
    rows = LoraRows.of_pages(torch.tensor([-1, 1, 1, -1, 3, -1]), num_pages=5)
    assert rows.ends_P.tolist() == [1, 4, 4, 6, 6]
    assert LoraRows.of_one_page(2, 7, 4, torch.device("cpu")).ends_P.tolist() == [0, 0, 7, 7]
