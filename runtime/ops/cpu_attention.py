"""Causal attention on the CPU with gradients, block of queries by block, with products by matmul.

PyTorch's flash kernel for the CPU reaches a fifth of matmul's speed at the widths of latent attention.
Shape suffixes: N documents x heads, L tokens, Q queries of a block, K keys up to its end, X and V widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

# Numbers of one block's scores at most, and its queries: 16 x 128 x 512 is the fastest of the sizes that were tried.
MAX_SCORES = 2**23
MAX_QUERIES, MIN_QUERIES = 128, 16
# Up to so many numbers the probabilities are kept for backward; past it they are computed again.
MAX_KEPT = 2**24


def causal_attention(query_NLX: Tensor, key_NLX: Tensor, value_NLV: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v under a causal mask, [N, L, V]; 16-bit scores are rounded, their softmax is float32's."""
    scaled_NLX = (query_NLX * scale).contiguous()
    out_NLV = _CausalAttention.apply(scaled_NLX, key_NLX, value_NLV)  # type: ignore[no-untyped-call]
    return cast(Tensor, out_NLV)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        out_NLV = torch.empty(*query.shape[:2], value.shape[2], dtype=value.dtype)
        keeps = query.shape[0] * query.shape[1] ** 2 <= MAX_KEPT and any(ctx.needs_input_grad)
        kept = []
        for block in _blocks(query):
            probs_NQK = _probabilities(query, key, block)
            out_NLV[:, block] = torch.bmm(probs_NQK, value[:, : block.stop])
            if keeps:
                kept.append(probs_NQK)
        ctx.save_for_backward(query, key, value, *kept)
        return out_NLV

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *kept = ctx.saved_tensors
        grad_out_NLV = grads[0].contiguous()
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.empty_like(x, dtype=torch.float32) for x in (key, value))
        # The last block sees all keys, so its gradients are the first of each sum.
        for index, block in reversed([*enumerate(_blocks(query))]):
            seen, is_first = slice(0, block.stop), block.stop == query.shape[1]
            probs_NQK = kept[index] if kept else _probabilities(query, key, block)
            part = torch.bmm(probs_NQK.transpose(1, 2), grad_out_NLV[:, block])
            _ = grad_value.copy_(part) if is_first else grad_value[:, seen].add_(part)
            grad_probs_NQK = torch.bmm(grad_out_NLV[:, block], value[:, seen].transpose(1, 2))
            grad_NQK = torch.ops.aten._softmax_backward_data(grad_probs_NQK, probs_NQK, -1, probs_NQK.dtype)
            grad_query[:, block] = torch.bmm(grad_NQK, key[:, seen])
            part = torch.bmm(grad_NQK.transpose(1, 2), query[:, block])
            _ = grad_key.copy_(part) if is_first else grad_key[:, seen].add_(part)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _probabilities(query: Tensor, key: Tensor, block: slice) -> Tensor:
    """Of a block's queries over the keys up to its end, [N, Q, K]."""
    scores_NQK = torch.bmm(query[:, block], key[:, : block.stop].transpose(1, 2))
    later_QQ = torch.ones(block.stop - block.start, block.stop - block.start, dtype=torch.bool).triu(1)
    scores_NQK[:, :, block.start :].masked_fill_(later_QQ, float("-inf"))
    return scores_NQK.softmax(-1)


def _blocks(query: Tensor) -> Iterator[slice]:
    num_rows, num_tokens = query.shape[:2]
    size = max(MIN_QUERIES, min(MAX_QUERIES, MAX_SCORES // (num_rows * num_tokens)))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))
