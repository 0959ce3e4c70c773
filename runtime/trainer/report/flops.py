"""FLOPs of LoRA training and the share of the device's peak that they use (MFU).

The convention, which every printed MFU follows: a frozen weight costs 4 per parameter and token (2 forward, 2 for the
input's gradient, none for its own), a LoRA parameter 6. Counted are the weights that a token passes through: all of
attention, the router, shared or dense MLP, and top-k of the routed experts; looking up an embedding costs nothing, and
the output head is counted for target tokens alone. Attention scores are counted over the causal half of each document,
forward and twice in backward. Padding and what checkpointing computes again count nothing: they are no useful work.
Calling 6 per parameter useful, as for full training, would overstate MFU by up to half.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from runtime.models.deepseek.config import DeepseekConfig

if TYPE_CHECKING:
    from runtime.trainer.plan import TensorInfo

FROZEN_FLOPS = 4  # per parameter and token
LORA_FLOPS = 6
CONVENTION = "4 FLOPs per frozen and 6 per LoRA parameter and token, causal half of the attention scores"
PEAK = "against the fastest matrix product measured on this device at start"
LEAST_MATMUL_SECONDS = 0.02
MAX_MATMUL_SIZE = 8192
NUM_MATMULS = 5


@dataclass(frozen=True)
class LoraSize:
    """LoRA parameters that one token passes through, and those that only a target token does (the output head's)."""

    per_token: float
    per_target: float = 0.0

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo]) -> LoraSize:
        """Sum over the trainable tensors, each by its `active_share`."""
        sums = {True: 0.0, False: 0.0}
        for tensor in tensors:
            sums[tensor.kind.startswith("lm_head")] += tensor.num_parameters * tensor.active_share
        return cls(sums[False], sums[True])


def expert_share(config: DeepseekConfig) -> float:
    """Share of one layer's routed experts that a token passes through: top-k / experts."""
    return config.num_experts_per_tok / config.n_routed_experts


@lru_cache(maxsize=8)
def active_parameters(config: DeepseekConfig) -> int:
    """Base parameters in the matrix products of one token, without embedding and output head."""
    return _body_parameters(config, config.num_experts_per_tok)


@lru_cache(maxsize=8)
def base_parameters(config: DeepseekConfig) -> int:
    """Parameters of the whole base: all experts, embedding, output head and norms; without multi-token prediction."""
    outer = head_parameters(config) * (1 if config.tie_word_embeddings else 2)
    norms = config.num_hidden_layers * (2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0))
    bias = _num_moe_layers(config) * config.n_routed_experts * (config.scoring_func == "sigmoid")
    return _body_parameters(config, config.n_routed_experts) + outer + norms + config.hidden_size + bias


def head_parameters(config: DeepseekConfig) -> int:
    """Parameters of the output head."""
    return config.vocab_size * config.hidden_size


def attention_flops(config: DeepseekConfig, document_lengths: Iterable[int]) -> int:
    """Scores and weighted values of all layers, forward and backward; a token sees itself and those before it."""
    num_pairs = sum(length * (length + 1) // 2 for length in document_lengths)
    forward = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * num_pairs
    return 3 * forward * config.num_hidden_layers  # both factors of each product are activations: backward is twice


def step_flops(
    config: DeepseekConfig, document_lengths: Iterable[int], num_target_tokens: int, lora: LoraSize
) -> float:
    """Useful FLOPs of one optimizer step over all processes, by the convention above.

    `document_lengths` are the tokens of every document of the step (padding left out), `num_target_tokens` those with
    a loss.
    """
    lengths = list(document_lengths)
    per_token = FROZEN_FLOPS * active_parameters(config) + LORA_FLOPS * lora.per_token
    per_target = FROZEN_FLOPS * head_parameters(config) + LORA_FLOPS * lora.per_target
    return per_token * sum(lengths) + per_target * num_target_tokens + attention_flops(config, lengths)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Share of `peak` (FLOP/s of all processes together) that a step of `flops` in `seconds` used; above 0."""
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"MFU of {seconds} seconds at a peak of {peak} FLOP/s: both must be above 0")
    return flops / seconds / peak


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products in `dtype`, about a second; it stands for the peak in an MFU.

    Nobody states a CPU's peak, and data sheets of accelerators state more than any product reaches. One process
    measures with its own threads while the others wait; the run's peak is that times their number.
    """
    size, seconds = 256, 0.0
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(_matmul_seconds(a, b) for _ in range(NUM_MATMULS))
        if seconds >= LEAST_MATMUL_SECONDS or size >= MAX_MATMUL_SIZE:
            return 2 * size**3 / seconds
        size *= 2


def _matmul_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    begin = time.perf_counter()
    product = a @ b
    product[-1, -1].item()  # waits for any device
    return time.perf_counter() - begin


def _body_parameters(config: DeepseekConfig, num_experts: int) -> int:
    linears = sum(math.prod(shape) for name, shape in config.linear_shapes().items() if name != "lm_head")
    router = config.n_routed_experts * config.hidden_size
    experts = num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    return linears + _num_moe_layers(config) * (router + experts)


def _num_moe_layers(config: DeepseekConfig) -> int:
    return sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
