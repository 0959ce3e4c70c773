"""What a guide does to logits, and that rows without one are left alone."""

from __future__ import annotations

import random

import pytest
import torch

from runtime.engine.guides.guide import Guide
from runtime.engine.messages import AddRequest, RequestId
from runtime.engine.sampler import Sampler
from runtime.engine.sampling_params import GuideKind, GuideSpec, SamplingParams
from runtime.engine.sequence import Sequence

SPEC = GuideSpec(GuideKind.REGEX, "a")


def _guide(allowed: set[int], num_bytes: int) -> Guide:
    guide = Guide(1, RequestId(1), SPEC)
    guide.allow(sum(1 << token_id for token_id in allowed).to_bytes(num_bytes, "little"))
    return guide


@pytest.mark.parametrize("vocab_size", [1, 7, 32, 1000, 129_280])
def test_masked_logits_keep_the_bits_of_what_is_allowed_and_nothing_else(vocab_size: int) -> None:
    allowed = {token_id for token_id in range(vocab_size) if random.Random(token_id).random() < 0.3} | {vocab_size - 1}
    logits = 10 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    masked = logits.clone()
    _guide(allowed, 4 * -(-vocab_size // 32)).mask_(masked)
    mask = torch.tensor([token_id in allowed for token_id in range(vocab_size)])
    assert torch.equal(masked[mask], logits[mask])
    assert bool((masked[~mask] == -torch.inf).all())


def test_a_guide_that_is_not_ready_does_not_let_anything_pass() -> None:
    guide = _guide({1}, 4)
    guide.ask(0.0)
    with pytest.raises(RuntimeError, match="not ready"):
        guide.mask_(torch.zeros(8))


def test_rows_without_a_guide_are_the_same_tensor_and_beside_guided_ones_the_same_bits() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    sequences = [Sequence.from_request(AddRequest(RequestId(row), [3], SamplingParams(5)), None) for row in range(3)]
    sampler = Sampler(frozenset({7}))
    before = logits.clone()
    assert sampler.process(logits, sequences) is logits
    sequences[1].guide = _guide({4, 9}, 8)
    processed = sampler.process(logits, sequences)
    assert torch.equal(processed[[0, 2]], before[[0, 2]]) and torch.equal(logits, before)
    assert processed[1].isfinite().nonzero().flatten().tolist() == [4, 9]
    assert {token.token_id for token in sampler.sample(logits, sequences)[1:2]} <= {4, 9}


def test_an_end_is_possible_before_the_least_tokens_if_nothing_else_is() -> None:
    params = SamplingParams(max_new_tokens=9, min_new_tokens=5)
    sequence = Sequence.from_request(AddRequest(RequestId(1), [3], params), None, _guide({7}, 8))
    assert Sampler(frozenset({7})).sample(torch.randn(1, 40), [sequence])[0].token_id == 7
