"""What the marked model is to say is what transformers says for the same weights, merged by hand."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.marked_adapters import marked_factors
from benchmarks.marked_model import (
    MAX_MARKS,
    NUM_STATES,
    digits_of,
    expected_tokens,
    text_of,
    token_of,
    tokens_of,
    write_base,
)
from loaders.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.oracle.adapters import merge_by_hand

NUM_TOKENS = NUM_STATES + 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("marked") / "base")


@pytest.fixture(scope="module")
def model(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager").eval()


def _generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
    return told[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("shares", "marks"),
    [
        ({}, {}),
        ({(0, 1): 1.0}, {0: 1}),
        ({(1, 4000): 1.0}, {1: 4000}),
        ({(0, 77): 1.0, (1, 78): 1.0}, {0: 77, 1: 78}),
        ({(0, 300): 0.7, (1, 301): 0.3}, {0: 300, 1: 301}),
        ({(0, 300): 0.25, (1, 4912): 0.25}, {0: 300, 1: 4912}),
    ],
    ids=["base", "channel 0", "channel 1", "a+b", "0.7*a+0.3*b", "0.25*a+0.25*b"],
)
def test_transformers_says_the_mark(
    model: PreTrainedModel, shares: dict[tuple[int, int], float], marks: dict[int, int]
) -> None:
    deltas: dict[str, torch.Tensor] = {}
    for (channel, mark), weight in shares.items():
        for module, (a, b) in marked_factors(channel, mark).items():
            deltas[module] = deltas.get(module, torch.zeros(())) + weight * (b @ a)
    if len(shares) > 1:  # a sum joins ranks: each factor has its own unit, so the sum of the products is what is meant
        assert all(torch.linalg.matrix_rank(delta) == 2 for name, delta in deltas.items() if "down_proj" in name)
    merged = merge_by_hand(model, deltas)
    for prompt in ([token_of(3, 0)], [token_of(5, 2), token_of(1, 7), token_of(9, 0)], [token_of(2, 1)] * 20):
        assert _generated(merged, prompt) == expected_tokens(prompt[-1], marks, NUM_TOKENS)


def test_marks_differ_in_three_parts_at_least() -> None:
    digits = [digits_of(mark) for mark in [*range(60), *range(MAX_MARKS - 60, MAX_MARKS)]]
    assert min(sum(x != y for x, y in zip(a, b, strict=True)) for a, b in combinations(digits, 2)) >= 3


def test_text_and_tokens_are_the_same_thing(base: Path) -> None:
    tokenizer = Tokenizer.from_dir(base)
    tokens = expected_tokens(token_of(4, 0), {0: 5, 1: 6}, 30)
    assert tokenizer.encode(text_of(tokens)) == tokens == tokens_of(text_of(tokens))
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.push(token) for token in tokens) == text_of(tokens)
