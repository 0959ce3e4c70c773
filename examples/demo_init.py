"""A hand-set start for the demo base: one previous-token head and two induction heads.

Copying is most of what the demo tasks need, and a small model takes long to find the heads that copy: after a
million tokens it had not. Set by hand, they leave the few million tokens of the demo corpus for everything else.
All of it stays trainable.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM

BIAS_DIM = 0  # this dimension of every embedding starts with the same value, as a constant input
BIAS_VALUE = 2.0
EMBEDDING_STD = 0.2
OUTPUT_SCALE = 0.3  # of what every block adds at first, so that the token's own embedding is not drowned
INDUCTION_GAIN = 1.2
COPY_GAIN = 0.5
HEAD_SCALE = 0.4  # of the output head, which starts as the embedding
NUM_TURNS = 5  # the slower rotations tell neighbours apart too little to be worth their noise
SHARPNESS = 7.0  # length of each (even, odd) pair of query and key under the rotary embedding


def _head_rows(model: DeepseekV3ForCausalLM, head: int) -> tuple[slice, slice, slice, slice]:
    """Rows of q_b for the head's nope and rope parts, and rows of kv_b for its keys and values."""
    config = model.config
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    q, kv = head * (nope + rope), head * (nope + value)
    return (
        slice(q, q + nope),
        slice(q + nope, q + nope + rope),
        slice(kv, kv + nope),
        slice(kv + nope, kv + nope + value),
    )


def _set_previous_token_head(model: DeepseekV3ForCausalLM, attention: nn.Module, head: int) -> None:
    """The head attends to position t - 1: its query is its key turned back by one position, whatever the token."""
    q_nope, q_rope, k_nope, _ = _head_rows(model, head)
    rank, turns = model.config.kv_lora_rank, model.model.rotary_emb.inv_freq
    embedding = model.model.embed_tokens.weight
    constant = BIAS_VALUE / embedding.pow(2).mean(dim=-1).sqrt().mean()
    q_a, q_b = attention.get_parameter("q_a_proj.weight"), attention.get_parameter("q_b_proj.weight")
    kv_a, kv_b = attention.get_parameter("kv_a_proj_with_mqa.weight"), attention.get_parameter("kv_b_proj.weight")
    q_a[0] = 0.0
    q_a[0, BIAS_DIM] = 1.0
    q_b[q_nope] = 0.0
    q_b[q_rope] = 0.0
    kv_b[k_nope] = 0.0
    kv_a[:, BIAS_DIM] = 0.0
    kv_a[rank:] = 0.0
    last = 2 * NUM_TURNS
    kv_a[rank : rank + last : 2, BIAS_DIM] = SHARPNESS / constant
    rows = q_b[q_rope]
    rows[0:last:2, 0] = SHARPNESS / constant * torch.cos(-turns[:NUM_TURNS])
    rows[1:last:2, 0] = SHARPNESS / constant * torch.sin(-turns[:NUM_TURNS])


def _split_space(model: DeepseekV3ForCausalLM, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two orthonormal sets of directions, [hidden, value] and [hidden, rest of the latent], apart from `seen`.

    The first is where the previous-token head writes; the second is what the induction heads copy.
    """
    hidden, value, rank = model.config.hidden_size, model.config.v_head_dim, model.config.kv_lora_rank
    bias = torch.zeros(hidden, 1)
    bias[BIAS_DIM] = 1.0
    written = torch.linalg.qr(torch.cat((bias, seen.T, torch.randn(hidden, value)), dim=1))[0][:, -value:]
    copied = torch.linalg.qr(torch.cat((bias, written, torch.randn(hidden, rank - value)), dim=1))[0][:, value + 1 :]
    return written, copied


def _set_induction_heads(model: DeepseekV3ForCausalLM, first: nn.Module, second: nn.Module) -> None:
    """Keys are what the previous-token head wrote, queries the same map of the current token; values are copied."""
    width, value, rank = model.config.qk_nope_head_dim, model.config.v_head_dim, model.config.kv_lora_rank
    values = _head_rows(model, 0)[3]
    q_a, q_b = second.get_parameter("q_a_proj.weight"), second.get_parameter("q_b_proj.weight")
    kv_a, kv_b = second.get_parameter("kv_a_proj_with_mqa.weight"), second.get_parameter("kv_b_proj.weight")
    output = second.get_parameter("o_proj.weight")
    seen = first.get_parameter("kv_b_proj.weight")[values] @ first.get_parameter("kv_a_proj_with_mqa.weight")[:rank]
    written, copied = _split_space(model, seen)
    embedding = model.model.embed_tokens.weight
    embedding -= embedding @ written @ written.T
    first.get_parameter("o_proj.weight")[:, :value] = written
    q_a[:width] = seen / seen.norm(dim=1, keepdim=True)
    kv_a[:rank] = torch.cat((written, copied), dim=1).T
    for head in range((rank - value) // value):
        q_nope, q_rope, k_nope, own_values = _head_rows(model, head)
        part = slice(value * (head + 1), value * (head + 2))  # of the latent
        q_b[q_nope] = 0.0
        q_b[q_rope] = 0.0
        kv_b[k_nope] = 0.0
        kv_b[own_values] = 0.0
        q_b[q_nope, :width] = torch.eye(width) * INDUCTION_GAIN
        kv_b[k_nope, :width] = torch.eye(width) * INDUCTION_GAIN
        kv_b[own_values, part] = torch.eye(value)
        columns = slice(head * value, (head + 1) * value)
        output[:, columns] = copied[:, columns] * COPY_GAIN


@torch.no_grad()
def set_copying_heads(model: DeepseekV3ForCausalLM) -> None:
    """Layer 0 gets the previous-token head, layer 1 two induction heads; the output head starts as the embedding."""
    embedding = model.model.embed_tokens.weight
    embedding.normal_()
    embedding *= EMBEDDING_STD / embedding.pow(2).mean(dim=-1, keepdim=True).sqrt()  # equal norms: a constant stays one
    embedding[:, BIAS_DIM] = BIAS_VALUE
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            parameter *= OUTPUT_SCALE
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    _set_previous_token_head(model, first, 0)
    _set_induction_heads(model, first, second)
    model.lm_head.weight.copy_(embedding * HEAD_SCALE)
    model.lm_head.weight[:, BIAS_DIM] = 0.0
