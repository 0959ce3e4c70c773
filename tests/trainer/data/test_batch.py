"""Batches against the flattening collator and the causal loss of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening
from transformers.loss.loss_utils import ForCausalLMLoss

from runtime.trainer.data.batch import IGNORED, collate
from runtime.trainer.data.documents import Document

VOCAB = 50


def document(length: int, seed: int = 0) -> Document:
    """Random tokens, some of them 0 or 1 like padding or EOS, of which some are learnt."""
    numbers = np.random.default_rng(seed)
    is_target = numbers.random(length) < 0.6
    is_target[:1] = False
    return Document(numbers.integers(0, VOCAB, length).astype(np.int32), is_target)


def labels(document: Document) -> list[int]:
    return np.where(document.is_target, document.token_ids, IGNORED).tolist()


def test_a_packed_row_is_what_the_flattening_collator_of_transformers_makes() -> None:
    row = tuple(document(length, length) for length in (5, 1, 9, 2))
    features = [{"input_ids": d.token_ids.tolist(), "labels": labels(d)} for d in row]
    flat = DataCollatorWithFlattening()(features)
    batch = collate([row], width=17)
    assert torch.equal(batch.token_ids_BL, flat["input_ids"])
    assert torch.equal(batch.positions_BL, flat["position_ids"])
    # transformers' labels are shifted in the loss, ours are shifted already.
    assert batch.targets_BL[0, :-1].tolist() == flat["labels"][0, 1:].tolist()
    assert batch.targets_BL[0, -1] == IGNORED
    assert batch.lengths == ((5, 1, 9, 2),)


def test_the_loss_over_a_batch_is_that_of_transformers_over_its_documents() -> None:
    rows = [(document(7, 1), document(12, 2)), (document(20, 3),), (document(3, 4), document(2, 5), document(4, 6))]
    batch = collate(rows)
    logits = torch.randn(*batch.token_ids_BL.shape, VOCAB, generator=torch.Generator().manual_seed(0))
    seen = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets_BL.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    expected, num_targets = torch.zeros(()), 0
    for b, row in enumerate(rows):
        start = 0
        for d in row:
            part = logits[b : b + 1, start : start + len(d)]
            expected += ForCausalLMLoss(part, torch.tensor([labels(d)]), VOCAB, num_items_in_batch=torch.tensor(1))
            num_targets += int(d.is_target.sum())
            start += len(d)
    torch.testing.assert_close(seen, expected)
    assert batch.num_targets == num_targets


def test_padding_stands_only_at_the_end_and_is_never_learnt() -> None:
    batch = collate([(document(5),), (document(9, 1), document(2, 2))])
    assert batch.token_ids_BL.shape == (2, 16)
    assert {tensor.dtype for tensor in (batch.token_ids_BL, batch.targets_BL, batch.positions_BL)} == {torch.int64}
    for b, length in enumerate((5, 11)):
        assert not batch.token_ids_BL[b, length:].any()
        assert not batch.positions_BL[b, length:].any()
        assert (batch.targets_BL[b, length - 1 :] == IGNORED).all()


def test_eos_is_learnt_though_padding_has_the_same_look() -> None:
    """Masks go by length: a token that is learnt stays so whatever its id."""
    all_zero = Document(np.zeros(4, np.int32), np.array([False, True, True, True]))
    assert collate([(all_zero,)]).num_targets == 3


def test_the_width_is_given_or_the_longest_row_rounded_up() -> None:
    assert collate([(document(16),)]).token_ids_BL.shape == (1, 16)
    assert collate([(document(17),)]).token_ids_BL.shape == (1, 24)
    assert collate([(document(17),)], width=100).token_ids_BL.shape == (1, 100)
    with pytest.raises(ValueError, match="a row of 17 tokens does not fit into a batch of width 16"):
        collate([(document(17),)], width=16)
    with pytest.raises(ValueError, match="at least one row"):
        collate([])
