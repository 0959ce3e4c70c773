"""The loss over target tokens alone, in chunks, with the vocabulary split over tp.

Shape suffixes: T tokens, N target tokens, H hidden, V vocabulary of this process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runtime.distributed.collectives import enter_parallel, leave_parallel, max_over
from runtime.distributed.mesh import Group
from runtime.trainer.data.batch import IGNORED
from runtime.trainer.lora import LoraParallelLinear
from runtime.trainer.micro_batch import MicroBatch

# Numbers of one chunk's logits: past this they are computed chunk by chunk, and again on the way back.
MAX_LOGITS = 2**25


@dataclass(frozen=True)
class TargetLosses:
    """Per target token: its place T in the micro-batch, its negative log-likelihood, whether greedy decoding picks it.

    Of equal logits that is the token with the lowest id, as in the server.
    """

    rows_N: Tensor
    losses_N: Tensor
    is_best_N: Tensor


def target_losses(hidden_TH: Tensor, head: LoraParallelLinear, batch: MicroBatch, tp: Group) -> TargetLosses:
    """Losses of the tokens that are learnt; `hidden_TH` is normed."""
    rows_N = (batch.targets_T != IGNORED).nonzero().squeeze(1)
    targets_N = batch.targets_T[rows_N]
    hidden_NH = enter_parallel(hidden_TH.index_select(0, rows_N), tp)
    ids_N = batch.ids_T[rows_N]
    chunk = max(1, MAX_LOGITS // head.local_out)
    if len(rows_N) <= chunk:
        losses_N, is_best_N = _chunk_losses(hidden_NH, targets_N, ids_N, head, tp)
        return TargetLosses(rows_N, losses_N, is_best_N)
    parts = [
        checkpoint(_chunk_losses, *part, head, tp, use_reentrant=False)
        for part in zip(hidden_NH.split(chunk), targets_N.split(chunk), ids_N.split(chunk), strict=True)
    ]
    return TargetLosses(rows_N, torch.cat([losses for losses, _ in parts]), torch.cat([best for _, best in parts]))


def _chunk_losses(
    hidden_NH: Tensor, targets_N: Tensor, ids_N: Tensor, head: LoraParallelLinear, tp: Group
) -> tuple[Tensor, Tensor]:
    logits_NV = head(hidden_NH, ids_N)
    if tp.size == 1:
        losses_N, is_best_N = _NegativeLogLikelihood.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
        return losses_N, is_best_N
    logits_NV = logits_NV.float()
    local_vocabulary = head.local_out
    first = local_vocabulary * tp.rank
    local_N = targets_N - first
    is_here_N = (local_N >= 0) & (local_N < local_vocabulary)
    own_N = logits_NV.gather(1, local_N.clamp(0, local_vocabulary - 1)[:, None])[:, 0]
    target_logit_N = leave_parallel(torch.where(is_here_N, own_N, 0), tp)
    own_largest_N, own_best_N = logits_NV.detach().max(-1)
    largest_N = max_over(own_largest_N, tp)
    total_N = leave_parallel((logits_NV - largest_N[:, None]).exp().sum(-1), tp)
    nobody = local_vocabulary * tp.size
    candidate_N = torch.where(own_largest_N == largest_N, own_best_N + first, nobody)
    best_N = -max_over(-candidate_N, tp)  # the lowest of the processes' candidates
    return total_N.log() + largest_N - target_logit_N, best_N == targets_N


class _NegativeLogLikelihood(torch.autograd.Function):
    """Losses, and whether the target is the likeliest; the gradient passes over the logits twice, not five times."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits32_NV = logits_NV.float()
        log_probs_NV = logits32_NV.log_softmax(-1)
        own_N = log_probs_NV.gather(1, targets_N[:, None])[:, 0]
        # Of logits, since rounding may make log-probabilities equal; in float32, which takes a twentieth of the time.
        is_best_N = logits32_NV.argmax(-1) == targets_N
        ctx.save_for_backward(log_probs_NV, targets_N)
        ctx.dtype = logits_NV.dtype
        ctx.mark_non_differentiable(is_best_N)
        return -own_N, is_best_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        log_probs_NV, targets_N = ctx.saved_tensors
        grad_NV = torch.empty_like(log_probs_NV, dtype=ctx.dtype)
        # softmax minus one at the target, times the gradient of the loss: in float32, rounded once.
        probs_NV = log_probs_NV.exp()
        probs_NV[torch.arange(len(targets_N), device=targets_N.device), targets_N] -= 1
        torch.mul(probs_NV, grads[0][:, None], out=grad_NV)
        return grad_NV, None
