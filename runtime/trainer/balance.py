"""Load balance in training: an auxiliary loss per row, and a capacity that drops or re-routes what overflows.

Both are counted row by row of the batch, so they depend neither on micro-batches nor on processes.
Shape suffixes: T tokens, B rows of L tokens, E experts, K choices of a token.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from runtime.models.deepseek.router import Router
from runtime.trainer.micro_batch import MicroBatch


def balance_loss(scores_TE: Tensor, experts_TK: Tensor, batch: MicroBatch) -> Tensor:
    """The rows' mean balance loss of one layer, as DeepSeek-V3's sequence-wise one (arXiv:2412.19437, 2.1.2).

    Of each row: sum over experts of (share of the choices x E) x (mean normalised score); 1 when perfectly balanced.
    """
    num_experts = scores_TE.shape[1]
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    is_real_BL1 = batch.is_real_T.view(batch.num_rows, -1, 1)
    counts_B = is_real_BL1.sum((1, 2)).clamp(min=1)
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, experts_TK, 1.0)
    chosen_BE = (chosen_TE.view(batch.num_rows, -1, num_experts) * is_real_BL1).sum(1)
    load_BE = chosen_BE * num_experts / (experts_TK.shape[1] * counts_B[:, None])
    mean_BE = (shares_TE.view(batch.num_rows, -1, num_experts) * is_real_BL1).sum(1) / counts_B[:, None]
    return (load_BE * mean_BE).sum() * batch.row_weight


def add_to_gradients(x: Tensor, loss: Tensor) -> Tensor:
    """x as it is; on the way back `loss` counts as a part of the training loss."""
    return cast(Tensor, _AddLoss.apply(x, loss))  # type: ignore[no-untyped-call]


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=ctx.dtype, device=grads[0].device)


def limit_load(
    router: Router, scores_TE: Tensor, experts_TK: Tensor, batch: MicroBatch, factor: float, *, reroute: bool
) -> tuple[Tensor, Tensor]:
    """Experts [T, K] and which choices are kept [T, K], with at most ceil(factor x L x K / E) of each expert in a row.

    L counts the row's tokens without padding. The choices with the highest scores stay. With `reroute` an
    overflowing choice goes to the token's next best expert with room; what finds none is dropped.
    """
    num_experts, num_choices = scores_TE.shape[1], experts_TK.shape[1]
    row_T = torch.arange(len(scores_TE), device=scores_TE.device) // batch.width
    # Rounded first, so that a product which is whole but for the last bits of a float is not rounded up.
    capacities = [math.ceil(round(factor * sum(row) * num_choices / num_experts, 9)) for row in batch.lengths]
    capacity_T = torch.tensor(capacities, device=scores_TE.device)[row_T]
    scores = scores_TE.detach()
    is_real_T1 = batch.is_real_T[:, None]
    keep_TK = _within_capacity(scores, experts_TK, row_T, capacity_T, is_real_T1.int()) & is_real_T1
    if not reroute:
        return experts_TK, keep_TK
    wishes_TE = router.choice_scores(scores)
    wishes_TE = wishes_TE.masked_fill(wishes_TE == 0, -math.inf)  # V2 marks groups that are not open by zeros
    tried_TE = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, experts_TK, True)
    for _ in range(num_experts - num_choices):
        wishes = wishes_TE.masked_fill(tried_TE, -math.inf)
        room_TE = _room(experts_TK, keep_TK, row_T, capacity_T, num_experts)
        best_T = wishes.masked_fill(~room_TE, -math.inf).max(-1)
        moves_T = (~keep_TK).any(-1) & batch.is_real_T & torch.isfinite(best_T.values)
        if not bool(moves_T.any()):
            break
        place_T = (~keep_TK).int().argmax(-1)  # the first of the token's overflowing choices
        experts_TK = experts_TK.clone()
        experts_TK[moves_T, place_T[moves_T]] = best_T.indices[moves_T]
        tried_TE[moves_T, best_T.indices[moves_T]] = True
        order_TK = is_real_T1.int() + keep_TK
        keep_TK = _within_capacity(scores, experts_TK, row_T, capacity_T, order_TK) & is_real_T1
    return experts_TK, keep_TK


def _within_capacity(
    scores_TE: Tensor, experts_TK: Tensor, row_T: Tensor, capacity_T: Tensor, class_TK: Tensor
) -> Tensor:
    """Which choices are among their row's best for their expert: those of a higher class first, then by score."""
    num_experts = scores_TE.shape[1]
    score_C = (scores_TE.gather(1, experts_TK).double() + 2.0 * class_TK).flatten()  # scores are within 0..1
    bin_C = (row_T[:, None] * num_experts + experts_TK).flatten()
    order_C = score_C.argsort(descending=True, stable=True)
    order_C = order_C[bin_C[order_C].argsort(stable=True)]
    sorted_bins = bin_C[order_C]
    first_C = torch.searchsorted(sorted_bins, sorted_bins)
    rank_C = torch.empty_like(bin_C)
    rank_C[order_C] = torch.arange(len(bin_C), device=bin_C.device) - first_C
    return (rank_C < capacity_T.repeat_interleave(experts_TK.shape[1])).view_as(experts_TK)


def _room(experts_TK: Tensor, keep_TK: Tensor, row_T: Tensor, capacity_T: Tensor, num_experts: int) -> Tensor:
    """[T, E]: whether an expert has room left in the token's row."""
    num_rows = int(row_T[-1]) + 1
    bins_C = (row_T[:, None] * num_experts + experts_TK)[keep_TK]
    load_BE = torch.bincount(bins_C, minlength=num_rows * num_experts).view(num_rows, num_experts)
    return load_BE[row_T] < capacity_T[:, None]
