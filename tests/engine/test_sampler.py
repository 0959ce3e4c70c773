"""Sampling against transformers' logits warpers, and draws against the distribution they are drawn from."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from runtime.engine.messages import AddRequest, RequestId
from runtime.engine.sampler import Sampler, filtered_probabilities
from runtime.engine.sampling_params import SamplingParams
from runtime.engine.sequence import Sequence

VOCABULARY = 50
EOS = 7


def _logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def _sequence(params: SamplingParams, generated: int = 0) -> Sequence:
    sequence = Sequence.from_request(AddRequest(RequestId(1), [3, 4], params), None)
    sequence.token_ids += [5] * generated
    return sequence


def _draw(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    sampler, sequence = Sampler(frozenset({EOS})), _sequence(params)
    return [sampler.sample(logits[None], [sequence])[0].token_id for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.5, 9, 0.6), (2.0, 50, 0.01)]
)
def test_filters_equal_the_warpers_of_transformers(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, _logits(seed)[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    seen = filtered_probabilities(_logits(seed), temperature, top_k, top_p)
    torch.testing.assert_close(seen, scores[0].softmax(-1))
    assert torch.equal(seen == 0, scores[0].softmax(-1) == 0)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over the tokens with at least five expected draws, at the 99.9 % point."""
    params = SamplingParams(max_new_tokens=10, temperature=1.0, top_k=8, seed=11)
    draws, count = _draw(_logits(0), params, 4000), 4000
    expected = filtered_probabilities(_logits(0), 1.0, 8, 1.0) * count
    seen = torch.bincount(torch.tensor(draws), minlength=VOCABULARY)
    assert not seen[expected == 0].any()
    common = expected >= 5
    statistic = ((seen - expected)[common] ** 2 / expected[common]).sum()
    assert statistic < 26.1  # chi-square with at most 8 degrees of freedom


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    first, again, other = (
        _draw(_logits(1), SamplingParams(max_new_tokens=40, temperature=1.5, seed=seed), 40) for seed in (5, 5, 6)
    )
    assert first == again != other


def test_end_of_sequence_is_masked_until_enough_tokens_are_there() -> None:
    logits = _logits(2)
    logits[EOS] = 100.0
    params = SamplingParams(max_new_tokens=5, min_new_tokens=3)
    sampler = Sampler(frozenset({EOS}))
    early = sampler.sample(logits[None], [_sequence(params, generated=2)])[0].token_id
    late = sampler.sample(logits[None], [_sequence(params, generated=3)])[0].token_id
    assert early != EOS and late == EOS


def test_logprobs_ranks_and_alternatives_are_those_of_the_model() -> None:
    logits = _logits(3)
    params = SamplingParams(max_new_tokens=5, temperature=5.0, top_k=20, seed=2, logprobs=True, num_top_tokens=4)
    token = Sampler(frozenset()).sample(logits[None], [_sequence(params)])[0]
    logprobs = logits.log_softmax(-1)
    assert token.logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-5)
    assert token.rank == logits.argsort(descending=True).tolist().index(token.token_id) + 1
    assert [top.token_id for top in token.top_tokens] == logits.topk(4).indices.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", -1), ("max_new_tokens", 0),
     ("min_new_tokens", 9), ("seed", -1), ("num_top_tokens", 11)],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    params = SamplingParams(**{"max_new_tokens": 5, field: value})
    with pytest.raises(ValueError, match=field):
        params.validate()
