"""Batches of short samples of near-equal length, and exact-match decoding: for the training of the base."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from demo_tasks import Sample
    from transformers import PreTrainedTokenizerFast

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of BOS + prompt + answer + EOS, and how many of them are the prompt's."""

    ids: list[int]
    num_prompt: int


@dataclass(frozen=True)
class Batch:
    """Right-padded ids, next-token targets (IGNORED on padding) and loss weights, all [batch, tokens]."""

    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> list[Encoded]:
    """Tokenise samples; prompt and answer are tokenised apart, as a server sees them."""
    prompts = tokenizer([sample.prompt for sample in samples]).input_ids
    answers = tokenizer([sample.completion for sample in samples], add_special_tokens=False).input_ids
    end = tokenizer.eos_token_id
    return [Encoded([*p, *a, end], len(p)) for p, a in zip(prompts, answers, strict=True)]


def collate(rows: Sequence[Encoded], pad_id: int, prompt_weight: float) -> Batch:
    """Pad rows on the right; padding is masked by length, since the pad token is EOS and EOS must be learnt."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), IGNORED)
    weights = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length] = torch.tensor(row.ids)
        targets[index, : length - 1] = ids[index, 1:length]
        weights[index, : length - 1] = 1.0
        weights[index, : row.num_prompt - 1] = prompt_weight
    return Batch(ids, targets, weights)


def stream_batches(
    samples: Iterator[Sample],
    tokenizer: PreTrainedTokenizerFast,
    batch_tokens: int,
    prompt_weight: float,
    rng: random.Random,
    pool_size: int = 4096,
) -> Iterator[Batch]:
    """Sort a pool of samples by length, cut it into batches of about batch_tokens, and shuffle those."""
    while pool := list(islice(samples, pool_size)):
        rows = sorted(encode(tokenizer, pool), key=lambda row: len(row.ids))
        groups: list[list[Encoded]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row.ids) > batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from (collate(group, tokenizer.eos_token_id, prompt_weight) for group in groups if group)


def weighted_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the weighted targets; logits [batch, tokens, vocab]."""
    losses = functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (losses * batch.weights.flatten()).sum() / batch.weights.sum()


@torch.no_grad()
def forced_exact(model: torch.nn.Module, rows: Sequence[Encoded], pad_id: int) -> float:
    """Share of rows whose every answer token is the most likely one; equal to greedy exact match."""
    correct = 0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64], pad_id, prompt_weight=0.0)
        best = model(input_ids=batch.ids, use_cache=False).logits.argmax(-1)
        wrong = (best != batch.targets) & (batch.weights > 0)
        correct += int((~wrong.any(dim=1)).sum())
    return correct / len(rows)
