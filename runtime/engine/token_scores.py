"""What the model thought of given tokens: log-softmax, ranks and alternatives, before any filter of a request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.engine.messages import TokenScore, TopToken


def score_tokens(logits_RV: Tensor, token_ids: Sequence[int], num_top_tokens: Sequence[int]) -> list[TokenScore]:
    """Score `token_ids[i]` by row i of float32 logits [R, V], with `num_top_tokens[i]` alternatives, likeliest first.

    The rank counts from 1 and is shared by tokens that are equally likely.
    """
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen_R1 = logprobs_RV.gather(-1, torch.tensor(token_ids, device=logits_RV.device)[:, None])
    ranks = ((logprobs_RV > chosen_R1).sum(-1) + 1).tolist()
    tops = _top_tokens(logprobs_RV, num_top_tokens)
    return [
        TokenScore(logprob, rank, top)
        for logprob, rank, top in zip(chosen_R1[:, 0].tolist(), ranks, tops, strict=True)
    ]


def _top_tokens(logprobs_RV: Tensor, counts: Sequence[int]) -> list[list[TopToken]]:
    most = min(max(counts), logprobs_RV.shape[-1])
    if not most:
        return [[] for _ in counts]
    values, indices = logprobs_RV.topk(most)
    rows = zip(indices.tolist(), values.tolist(), counts, strict=True)
    return [[TopToken(*pair) for pair in zip(ids[:count], row[:count], strict=True)] for ids, row, count in rows]
