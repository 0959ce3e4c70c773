"""Draws against the distribution that transformers would draw from, seeds, and what is told of each token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from runtime.engine.messages import AddRequest, RequestId
from runtime.engine.sampler import Sampler
from runtime.engine.sampling_params import SamplingParams
from runtime.engine.sequence import Sequence
from tests.conftest import RecordNumber
from tests.oracle.logits_processors import EOS, processed_by_transformers

VOCABULARY = 50
NUM_DRAWS = 3000
PROMPT = [3, 4]
DISTRIBUTIONS = {
    "temperature": {"temperature": 1.6},
    "top_k": {"temperature": 1.0, "top_k": 8},
    "top_p": {"temperature": 2.0, "top_p": 0.7},
    "typical_p": {"temperature": 1.3, "typical_p": 0.8},
    "repetition penalty": {"temperature": 1.0, "repetition_penalty": 1.8},
    "length penalty": {"temperature": 1.0, "length_penalty_start": 1, "length_penalty_factor": 1.5},
    "everything": {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "typical_p": 0.9, "repetition_penalty": 1.2,
                   "length_penalty_factor": 1.2, "min_new_tokens": 2},
}  # fmt: skip


def _logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def _params(**fields: float) -> SamplingParams:
    return replace(SamplingParams(max_new_tokens=64), **fields)  # type: ignore[arg-type]


def _sequence(params: SamplingParams, generated: int = 0) -> Sequence:
    sequence = Sequence.from_request(AddRequest(RequestId(1), PROMPT, params), None)
    sequence.token_ids += [5] * generated
    return sequence


def _draw(logits: torch.Tensor, params: SamplingParams, count: int, generated: int = 0) -> list[int]:
    sampler, sequence = Sampler(frozenset(EOS)), _sequence(params, generated)
    return [sampler.sample(logits[None], [sequence])[0].token_id for _ in range(count)]


def _p_value(draws: list[int], probabilities: torch.Tensor) -> float:
    """Pearson's chi-square test; tokens with fewer than five expected draws are counted together."""
    expected = probabilities.double() * len(draws)
    seen = torch.bincount(torch.tensor(draws), minlength=len(probabilities)).double()
    assert not seen[expected == 0].any(), "a token was drawn that must not be"
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected > 0
    statistic = ((seen - expected)[used] ** 2 / expected[used]).sum()
    freedom = torch.tensor((int(used.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_distribution_of_transformers(name: str, record_number: RecordNumber) -> None:
    params = _params(**DISTRIBUTIONS[name], seed=11)
    probabilities = processed_by_transformers(_logits(0), params, [*PROMPT, 5, 5, 5, 5], 2).softmax(-1)
    draws = _draw(_logits(0), params, NUM_DRAWS, generated=4)
    record_number(f"sampling: chi-square p of draws by {name}", _p_value(draws, probabilities), at_least=0.001)


def test_first_tokens_over_many_seeds_follow_the_distribution(record_number: RecordNumber) -> None:
    """Neighbouring seeds must not give related numbers, as each request has its own."""
    params = _params(temperature=1.0)
    draws = [_draw(_logits(0), replace(params, seed=seed), 1)[0] for seed in range(NUM_DRAWS)]
    p = _p_value(draws, processed_by_transformers(_logits(0), params, PROMPT, 2).softmax(-1))
    record_number("sampling: chi-square p of first draws over seeds", p, at_least=0.001)


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    first, again, other = (_draw(_logits(1), _params(temperature=1.5, seed=seed), 40) for seed in (5, 5, 6))
    assert first == again != other


def test_plain_greedy_rows_are_not_even_copied() -> None:
    """They share one argmax over the model's own logits, whatever the neighbours' details."""
    logits = torch.stack([_logits(seed) for seed in range(32)])
    sequences = [_sequence(_params(logprobs=row % 2 == 0, top_k=row, top_p=0.5), generated=3) for row in range(32)]
    sampler = Sampler(frozenset(EOS))
    assert sampler.process(logits, sequences) is logits
    tokens = [token.token_id for token in sampler.sample(logits, sequences)]
    assert tokens == logits.argmax(-1).tolist()


def test_penalties_and_the_least_length_act_on_greedy_requests_too() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[[5, 9, EOS[0]]] = torch.tensor([4.0, 3.0, 5.0])
    picked = {
        name: _draw(logits, _params(**fields), 1, generated=3)[0]
        for name, fields in {
            "nothing": {},
            "min_new_tokens": {"min_new_tokens": 4},
            "min_new_tokens that are there": {"min_new_tokens": 3},
            "both": {"min_new_tokens": 4, "repetition_penalty": 1.5},
        }.items()
    }
    assert picked == {"nothing": EOS[0], "min_new_tokens": 5, "min_new_tokens that are there": EOS[0], "both": 9}
    logits[EOS[0]] = 3.0
    assert _draw(logits, _params(length_penalty_start=1, length_penalty_factor=1.5), 1, generated=3) == [EOS[0]]


def test_logprobs_ranks_and_alternatives_are_those_of_the_model() -> None:
    logits = torch.stack([_logits(seed) for seed in (3, 4, 5)])
    asked = _params(temperature=5.0, top_k=20, seed=2, logprobs=True, num_top_tokens=4, repetition_penalty=1.9)
    sequences = [_sequence(_params()), _sequence(asked), _sequence(replace(asked, num_top_tokens=1))]
    plain, *told = Sampler(frozenset()).sample(logits, sequences)
    assert (plain.logprob, plain.rank, plain.top_tokens) == (0.0, 0, [])
    for token, row, num_top in zip(told, logits[1:], (4, 1), strict=True):
        logprobs = row.log_softmax(-1)
        assert token.logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-5)
        assert token.rank == row.argsort(descending=True).tolist().index(token.token_id) + 1
        assert [top.token_id for top in token.top_tokens] == row.topk(num_top).indices.tolist()
        assert token.top_tokens[0].logprob == pytest.approx(float(logprobs.max()), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_told_and_its_neighbours_are_served(bad: float) -> None:
    logits = torch.stack([_logits(1), _logits(2), _logits(3)])
    logits[1, 20] = bad
    sequences = [_sequence(_params(temperature=1.0, logprobs=True, repetition_penalty=1.2)) for _ in range(3)]
    tokens = Sampler(frozenset(EOS)).sample(logits, sequences)
    assert [token.is_finite for token in tokens] == [True, False, True]
    assert tokens[0].rank >= 1 and tokens[2].rank >= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", -1), ("max_new_tokens", 0),
     ("min_new_tokens", 9), ("seed", -1), ("num_top_tokens", 11), ("typical_p", 0.0), ("typical_p", 1.1),
     ("repetition_penalty", 0.0), ("repetition_penalty", 2.1), ("repetition_penalty", float("nan")),
     ("length_penalty_start", -1), ("length_penalty_factor", 0.9), ("length_penalty_factor", float("inf"))],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    params = SamplingParams(**{"max_new_tokens": 5, field: value})
    with pytest.raises(ValueError, match=field):
        params.validate()
