"""How many bytes of activations one process keeps for backward: an estimate from the shapes.

Counted is what autograd keeps of one token with LoRA on everything: inputs of norms and adapted linears, queries, keys,
values and attention output, both sides of SwiGLU, and the routed rows. Attention is taken as fused (its scores are not
kept), and what the allocator loses is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from runtime.models.deepseek.config import DeepseekConfig

LOGIT_BYTES = 3 * 4  # logits, their softmax and their gradient in fp32


def activation_bytes(
    config: DeepseekConfig,
    layers: Iterable[int],
    num_tokens: int,
    *,
    element_bytes: int,
    checkpointing: bool,
    num_in_flight: int = 1,
    tensor_shards: int = 1,
    expert_shards: int = 1,
) -> int:
    """Bytes at the peak for micro-batches of `num_tokens`, `num_in_flight` of which are kept at once (1F1B).

    With checkpointing every layer keeps its input, and one layer at a time all that it computes again. The logits of
    the output head are apart: `logit_bytes`.
    """
    layers = list(layers)
    values = [layer_values(config, layer, tensor_shards, expert_shards) for layer in layers]
    if checkpointing:
        kept = len(layers) * config.hidden_size * num_in_flight + max(values, default=0)
    else:
        kept = sum(values) * num_in_flight
    return kept * num_tokens * element_bytes


def logit_bytes(config: DeepseekConfig, num_target_tokens: int, tensor_shards: int = 1) -> int:
    """Bytes for the logits of one micro-batch, on the last stage."""
    return LOGIT_BYTES * num_target_tokens * config.vocab_size // tensor_shards


def layer_values(config: DeepseekConfig, layer: int, tensor_shards: int = 1, expert_shards: int = 1) -> int:
    """Values that one layer keeps of one token; routed rows are taken to spread evenly over `expert_shards`."""
    hidden, heads = config.hidden_size, config.num_attention_heads // tensor_shards
    latents = 2 * (config.kv_lora_rank + (config.q_lora_rank or 0)) + config.qk_rope_head_dim
    attention = heads * 2 * (config.qk_head_dim + config.v_head_dim)
    around = 4 * hidden  # the inputs of both norms, and what they give
    if not config.is_moe_layer(layer):
        return around + latents + attention + 3 * config.intermediate_size // tensor_shards
    shared = 3 * config.n_shared_experts * config.moe_intermediate_size // tensor_shards
    rows = config.num_experts_per_tok * (2 * hidden + 3 * config.moe_intermediate_size) // expert_shards
    return around + latents + attention + shared + rows + 2 * config.n_routed_experts
