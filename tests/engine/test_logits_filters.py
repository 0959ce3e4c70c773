"""Every sampling parameter against what transformers' `generate` would do to the same logits, bit for bit."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.engine.logits_filters import filter_for_draw, forbid_end_, penalize_length, penalize_repetition
from runtime.engine.messages import AddRequest, RequestId
from runtime.engine.sampler import Sampler
from runtime.engine.sampling_params import SamplingParams
from runtime.engine.sequence import Sequence
from tests.conftest import RecordNumber
from tests.oracle.logits_processors import EOS, processed_by_transformers

OFF = SamplingParams(max_new_tokens=64)
NUM_COMBINATIONS = 400
SINGLE = {
    "temperature": {"temperature": 0.7},
    "high temperature": {"temperature": 3.0},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k beyond the vocabulary": {"temperature": 1.0, "top_k": 10_000},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p that keeps one": {"temperature": 1.0, "top_p": 0.001},
    "typical_p": {"temperature": 1.0, "typical_p": 0.6},
    "typical_p that keeps one": {"temperature": 1.0, "typical_p": 0.001},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "repetition_penalty below 1": {"repetition_penalty": 0.6},
    "length penalty": {"length_penalty_start": 3, "length_penalty_factor": 1.3},
    "min_new_tokens": {"min_new_tokens": 20},
}


def _sequence(params: SamplingParams, token_ids: list[int], num_prompt_tokens: int) -> Sequence:
    prompt = token_ids[:num_prompt_tokens]
    sequence = Sequence.from_request(AddRequest(RequestId(1), prompt, params), None)
    sequence.token_ids += token_ids[num_prompt_tokens:]
    return sequence


def _seen(logits: Tensor, sequence: Sequence) -> Tensor:
    """What the engine's sampler takes the largest of, or draws from."""
    row = Sampler(frozenset(EOS)).process(logits[None], [sequence])[0]
    return filter_for_draw(row, sequence.params) if sequence.params.temperature else row


def _logits(seed: int, *, size: int = 100, ties: bool = False) -> Tensor:
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).round() / 2 if ties else logits


def _differs(seed: int, params: SamplingParams) -> bool:
    rng = random.Random(seed)
    size = rng.choice((40, 100, 1000))
    tokens = [rng.randrange(size) for _ in range(rng.randint(1, 60))]
    num_prompt_tokens = rng.randint(1, len(tokens))
    logits = _logits(seed, size=size, ties=seed % 4 == 0)
    untouched = logits.clone()
    seen = _seen(logits, _sequence(params, tokens, num_prompt_tokens))
    assert torch.equal(logits, untouched)
    return not torch.equal(seen, processed_by_transformers(logits, params, tokens, num_prompt_tokens))


@pytest.mark.parametrize("fields", SINGLE.values(), ids=SINGLE.keys())
def test_each_parameter_changes_logits_as_transformers_does(fields: dict[str, float]) -> None:
    params = replace(OFF, **fields)
    assert not [seed for seed in range(25) if _differs(seed, params)]


def test_each_parameter_changes_something() -> None:
    """Guards the comparison above: none of its settings is one that does nothing."""
    tokens = [3, 7, 31, 8, 9, *range(40, 52)]
    idle = []
    for name, fields in SINGLE.items():
        sequence = _sequence(replace(OFF, **fields), tokens, 5)
        if name != "top_k beyond the vocabulary" and torch.equal(_seen(_logits(1), sequence), _logits(1)):
            idle.append(name)
    assert not idle


def _random_params(rng: random.Random) -> SamplingParams:
    def maybe(off: float, value: float) -> float:
        return value if rng.random() < 0.6 else off

    return SamplingParams(
        max_new_tokens=64,
        min_new_tokens=int(maybe(0, rng.randint(1, 64))),
        temperature=maybe(0.0, rng.uniform(0.05, 4.0)),
        top_k=int(maybe(0, rng.randint(1, 120))),
        top_p=maybe(1.0, rng.uniform(0.01, 0.999)),
        typical_p=maybe(1.0, rng.uniform(0.01, 0.999)),
        repetition_penalty=maybe(1.0, rng.uniform(0.1, 2.0)),
        length_penalty_start=rng.randint(0, 20),
        length_penalty_factor=maybe(1.0, rng.uniform(1.0, 4.0)),
    )


def test_combined_parameters_keep_the_order_and_the_bits_of_transformers(record_number: RecordNumber) -> None:
    different = [seed for seed in range(NUM_COMBINATIONS) if _differs(seed, _random_params(random.Random(-1 - seed)))]
    record_number(f"sampling: combinations unlike transformers' in any bit, of {NUM_COMBINATIONS}", len(different),
                  at_most=0)  # fmt: skip


def test_a_row_is_processed_alike_alone_and_in_a_mixed_batch() -> None:
    rng = random.Random(5)
    items = [_random_params(rng) for _ in range(16)] + [OFF] * 4
    logits = torch.stack([_logits(seed) for seed in range(len(items))])
    tokens = [rng.randrange(100) for _ in range(30)]
    sampler = Sampler(frozenset(EOS))
    together = sampler.process(logits, [_sequence(params, tokens, 9) for params in items])
    for row, params in enumerate(items):
        alone = sampler.process(logits[row : row + 1], [_sequence(params, tokens, 9)])[0]
        assert torch.equal(together[row], alone)


def test_tokens_that_come_later_are_penalized_too() -> None:
    """One sequence through many steps: its memory of seen tokens equals a fresh look at all of them."""
    params = replace(OFF, repetition_penalty=1.7)
    sequence = _sequence(params, [5, 6], 2)
    for step in range(20):
        expected = processed_by_transformers(_logits(step), params, sequence.token_ids, 2)
        assert torch.equal(_seen(_logits(step), sequence), expected)
        sequence.token_ids.append((17 * step) % 100)


def test_early_end_is_forbidden_unless_nothing_else_is_left() -> None:
    logits = torch.full((3, 10), -math.inf)
    logits[0, [2, 4]] = 1.0
    logits[1, [4, 5]] = 1.0
    logits[2, 4] = 1.0
    forbid_end_(logits, torch.tensor([0, 1]), torch.tensor([4, 5]))
    assert logits.isfinite().nonzero().tolist() == [[0, 2], [1, 4], [1, 5], [2, 4]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_a_temperature_near_zero_leaves_the_largest_logits_only(temperature: float, shift: float) -> None:
    logits = torch.tensor([3.0, 2.9, 3.0, -8.0]) - 3 + shift
    kept = filter_for_draw(logits, replace(OFF, temperature=temperature, top_k=3, top_p=0.9, typical_p=0.9))
    probabilities = kept.softmax(-1)
    assert probabilities.sum() == pytest.approx(1) and probabilities[[1, 3]].eq(0).all()


@pytest.mark.parametrize("num_beyond", [1, 300, 100_000])
def test_a_length_penalty_beyond_all_numbers_ends_the_text(num_beyond: int) -> None:
    logits = torch.tensor([3.0, -2.0, 9.0, 0.0])
    raised = penalize_length(logits, torch.tensor([1, 3]), 10.0, num_beyond)
    assert raised.isfinite().all() and raised[3] == 0
    assert int(raised.argmax()) == 1
    probabilities = filter_for_draw(raised, replace(OFF, temperature=0.5)).softmax(-1)
    assert probabilities.sum() == pytest.approx(1) and probabilities.argmax() == 1


def test_the_smallest_repetition_penalty_gives_numbers() -> None:
    logits = torch.tensor([3.0, -2.0, 0.0, -math.inf, 5.0])
    changed = penalize_repetition(logits, torch.tensor([True, True, True, True, False]), 1e-45)
    assert changed[:3].isfinite().all() and changed[0] > 1e30 and changed[3] == -math.inf and changed[4] == 5
    assert filter_for_draw(changed, replace(OFF, temperature=0.1)).softmax(-1)[0] == 1
