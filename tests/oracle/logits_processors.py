"""Logits as transformers' `generate` would process them, with its own choice of processors and of their order."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from runtime.engine.sampling_params import SamplingParams

EOS = (7, 31)


class _Generate(GenerationMixin):  # type: ignore[misc]
    """The part of `generate` that chooses the processors; it needs no model."""

    config = SimpleNamespace(is_encoder_decoder=False)


def processed_by_transformers(
    logits_V: Tensor, params: SamplingParams, token_ids: list[int], num_prompt_tokens: int
) -> Tensor:
    """What `generate` hands to argmax, or to softmax for a draw; EOS are the tokens that end."""
    config = GenerationConfig(
        do_sample=params.temperature > 0,
        temperature=params.temperature or None,
        top_k=params.top_k,
        top_p=params.top_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        min_new_tokens=params.min_new_tokens,
        exponential_decay_length_penalty=(params.length_penalty_start, params.length_penalty_factor),
    )
    config._eos_token_tensor = torch.tensor(EOS)
    processors = _Generate()._get_logits_processor(config, input_ids_seq_length=num_prompt_tokens)
    result: Tensor = processors(torch.tensor([token_ids]), logits_V[None].clone())[0]
    return result
