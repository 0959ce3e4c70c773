"""From logits to tokens: greedy or sampled, with temperature, top-k and top-p applied in that order."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.engine.messages import TopToken
from runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class SampledToken:
    """A new token; log-probabilities are those of the model, before any of the request's filters.

    `is_finite` tells whether the logits were numbers; where they were not, the token means nothing.
    """

    token_id: int
    logprob: float = 0.0
    rank: int = 0
    top_tokens: list[TopToken] = field(default_factory=list)
    is_finite: bool = True


class Sampler:
    """Draws one token per row. End-of-sequence tokens are masked until `min_new_tokens` are there."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = sorted(eos_token_ids)

    def sample(self, logits_BV: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """Logits [B, vocabulary] float32, row i for `sequences[i]`."""
        masked_BV = self._mask_early_end(logits_BV, sequences)
        greedy = masked_BV.argmax(-1).tolist()
        finite = logits_BV.isfinite().all(-1).tolist()
        tokens = []
        for row, sequence in enumerate(sequences):
            token_id = greedy[row]
            if not finite[row]:
                tokens.append(SampledToken(token_id, is_finite=False))
                continue
            if sequence.generator is not None:
                token_id = draw(masked_BV[row], sequence)
            tokens.append(self._describe(logits_BV[row], token_id, sequence))
        return tokens

    def _mask_early_end(self, logits_BV: Tensor, sequences: list[Sequence]) -> Tensor:
        early = [row for row, item in enumerate(sequences) if item.num_generated < item.params.min_new_tokens]
        if not early or not self._eos:
            return logits_BV
        masked_BV = logits_BV.clone()
        masked_BV[torch.tensor(early)[:, None], torch.tensor(self._eos)] = float("-inf")
        return masked_BV

    def _describe(self, logits_V: Tensor, token_id: int, sequence: Sequence) -> SampledToken:
        params = sequence.params
        if not params.logprobs and not params.num_top_tokens:
            return SampledToken(token_id)
        logprobs_V = logits_V.log_softmax(-1)
        chosen = logprobs_V[token_id]
        top = logprobs_V.topk(params.num_top_tokens) if params.num_top_tokens else None
        top_tokens = []
        if top is not None:
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            top_tokens = [TopToken(index, value) for index, value in pairs]
        return SampledToken(token_id, float(chosen), int((logprobs_V > chosen).sum()) + 1, top_tokens)


def draw(logits_V: Tensor, sequence: Sequence) -> int:
    """One token from the filtered distribution, by inverting its cumulative sum at a uniform number.

    The number comes from the sequence's own generator, one per token, so a seed gives the same tokens alone, in any
    batch and after a preemption.
    """
    params = sequence.params
    probs_V = filtered_probabilities(logits_V, params.temperature, params.top_k, params.top_p)
    cumulative_V = probs_V.double().cumsum(-1)
    uniform = torch.rand((), generator=sequence.generator, dtype=torch.float64)
    target = uniform.to(cumulative_V.device) * cumulative_V[-1]
    return int(torch.searchsorted(cumulative_V, target, right=True).clamp(max=len(probs_V) - 1))


def filtered_probabilities(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [vocabulary] after temperature, then top-k, then top-p, as transformers' warpers define them."""
    scaled_V = logits_V / temperature
    if 0 < top_k < len(scaled_V):
        smallest_kept = scaled_V.topk(top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < smallest_kept, float("-inf"))
    if top_p < 1.0:
        ascending, order = scaled_V.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[-1] = False
        scaled_V = scaled_V.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), float("-inf"))
    return scaled_V.softmax(-1)
