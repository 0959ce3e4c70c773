"""From logits to tokens: each row is changed as its request asks, then the largest is taken, or one is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.engine.logits_filters import filter_for_draw, forbid_end_, penalize_length, penalize_repetition
from runtime.engine.messages import TopToken
from runtime.engine.sequence import Sequence
from runtime.engine.token_scores import score_tokens


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
    """Picks one token per row. Rows that ask for nothing special share one `argmax`."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_N = torch.tensor(sorted(eos_token_ids), dtype=torch.int64)

    def sample(self, logits_BV: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """Logits [B, vocabulary] float32, row i for `sequences[i]`; they are left as they are."""
        # Both extremes carry a NaN on; this is many times faster than asking every element.
        finite = (logits_BV.amax(-1).isfinite() & logits_BV.amin(-1).isfinite()).tolist()
        processed_BV = self.process(logits_BV, sequences)
        token_ids: list[int] = processed_BV.argmax(-1).tolist()
        for row, sequence in enumerate(sequences):
            if sequence.generator is not None and finite[row]:
                token_ids[row] = draw(processed_BV[row], sequence)
        tokens = [SampledToken(token_id, is_finite=ok) for token_id, ok in zip(token_ids, finite, strict=True)]
        return _with_details(tokens, logits_BV, sequences)

    def process(self, logits_BV: Tensor, sequences: list[Sequence]) -> Tensor:
        """Logits as the requests' penalties leave them: the same tensor if there are none, else a changed copy."""
        changed = [row for row, sequence in enumerate(sequences) if _changes_row(sequence)]
        early = [row for row, item in enumerate(sequences) if item.num_generated < item.params.min_new_tokens]
        early = early if len(self._eos_N) else []
        if not changed and not early:
            return logits_BV
        self._eos_N = self._eos_N.to(logits_BV.device)
        processed_BV = logits_BV.clone()
        for row in changed:
            processed_BV[row] = self._processed_row(processed_BV[row], sequences[row])
        if early:
            forbid_end_(processed_BV, torch.tensor(early, device=logits_BV.device), self._eos_N)
        return processed_BV

    def _processed_row(self, logits_V: Tensor, sequence: Sequence) -> Tensor:
        """One row [vocabulary] that is the sampler's own, after whatever `_changes_row` asks about."""
        params = sequence.params
        if sequence.guide is not None:
            sequence.guide.mask_(logits_V)
        if params.repetition_penalty != 1:
            logits_V = penalize_repetition(logits_V, _seen_tokens(logits_V, sequence), params.repetition_penalty)
        if params.length_penalty_factor != 1 and len(self._eos_N):
            num_beyond = sequence.num_generated - params.length_penalty_start
            logits_V = penalize_length(logits_V, self._eos_N, params.length_penalty_factor, num_beyond)
        return logits_V


def draw(logits_V: Tensor, sequence: Sequence) -> int:
    """One token from the filtered distribution, by inverting its cumulative sum at a uniform number.

    The number comes from the sequence's own generator, one per token, so a seed gives the same tokens alone, in any
    batch and after a preemption.
    """
    probs_V = filter_for_draw(logits_V, sequence.params).softmax(-1)
    cumulative_V = probs_V.double().cumsum(-1)
    uniform = torch.rand((), generator=sequence.generator, dtype=torch.float64)
    target = uniform.to(cumulative_V.device) * cumulative_V[-1]
    return int(torch.searchsorted(cumulative_V, target, right=True).clamp(max=len(probs_V) - 1))


def _changes_row(sequence: Sequence) -> bool:
    """Whether anything but `min_new_tokens` changes its logits before the pick."""
    params = sequence.params
    return sequence.guide is not None or params.repetition_penalty != 1 or params.length_penalty_factor != 1


def _seen_tokens(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """Bool [V] of the tokens in prompt and output; only tokens that are new since the last call are added."""
    if sequence.seen_V is None:
        sequence.seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
    new_ids = sequence.token_ids[sequence.num_seen :]
    sequence.seen_V[torch.tensor(new_ids, dtype=torch.int64, device=logits_V.device)] = True
    sequence.num_seen = len(sequence.token_ids)
    return sequence.seen_V


def _with_details(tokens: list[SampledToken], logits_BV: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    """Add log-probabilities, ranks and alternatives to the tokens whose requests ask for them."""
    wanted = [
        row
        for row, (token, sequence) in enumerate(zip(tokens, sequences, strict=True))
        if token.is_finite and sequence.params.logprobs
    ]
    if not wanted:
        return tokens
    if len(wanted) < len(tokens):
        logits_BV = logits_BV.index_select(0, torch.tensor(wanted, device=logits_BV.device))
    scores = score_tokens(
        logits_BV,
        [tokens[row].token_id for row in wanted],
        [sequences[row].params.num_top_tokens for row in wanted],
    )
    for row, score in zip(wanted, scores, strict=True):
        tokens[row] = SampledToken(tokens[row].token_id, score.logprob, score.rank, score.top_tokens)
    return tokens
