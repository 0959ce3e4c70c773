"""Plain PyTorch reference of choosing experts and sorting their rows; shape suffixes as in `routing.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.routing import RoutingRule, SortedRows


def choose_experts(logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Reference of `Ops.choose_experts`."""
    scores_TE = scores(logits_TE, rule)
    experts_TK = choose(choice_scores(scores_TE, bias_E, rule), rule)
    return weigh(scores_TE, experts_TK, rule), experts_TK


def scores(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """Every expert's score [T, E]."""
    return logits_TE.sigmoid() if rule.scoring == "sigmoid" else logits_TE.softmax(-1)


def choice_scores(scores_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> Tensor:
    """What the choice is made by [T, E]: biased, and `rule.masked` in groups that are not open."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if rule.num_groups == 1:
        return choice_TE
    groups_TGE = choice_TE.unflatten(-1, (rule.num_groups, -1))
    if rule.group_score == "best":
        group_scores_TG = groups_TGE.amax(-1)
    else:
        group_scores_TG = groups_TGE.topk(2, dim=-1).values.sum(-1)
    kept = group_scores_TG.topk(rule.num_kept_groups, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept, False)
    open_TGE: Tensor = groups_TGE.masked_fill(dropped[..., None], rule.masked)
    return open_TGE.flatten(1)


def choose(choice_TE: Tensor, rule: RoutingRule) -> Tensor:
    """The experts [T, K] that each token goes to."""
    return choice_TE.topk(rule.num_chosen, dim=-1, sorted=False).indices


def weigh(scores_TE: Tensor, experts_TK: Tensor, rule: RoutingRule) -> Tensor:
    """The weights [T, K] of chosen experts."""
    weights = scores_TE.gather(1, experts_TK)
    if rule.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scale


def sort_rows(x_TH: Tensor, keys_TK: Tensor, num_keys: int) -> SortedRows:
    """Reference of `Ops.sort_rows`."""
    keys_M = keys_TK.flatten()
    order_M = keys_M.argsort(stable=True)
    rows_M = order_M.div(keys_TK.shape[1], rounding_mode="floor")
    x_MH = x_TH.index_select(0, rows_M)  # many times as fast as x_TH[rows_M] on CPU
    return SortedRows(x_MH, torch.bincount(keys_M, minlength=num_keys), from_M=order_M)
