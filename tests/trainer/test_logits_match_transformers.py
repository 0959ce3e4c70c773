"""The training stage's logits against transformers', for documents packed into rows and rows with padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conftest import RecordNumber
from tests.oracle.base_models import Oracle, logits
from tests.oracle.shapes import SHAPES, V3, Shape
from tests.trainer.stages import make_batch, make_rows, make_stage

LENGTHS = ((30, 50), (17,), (1, 16, 33, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_document_of_a_packed_row_gets_the_logits_that_transformers_gives_it_alone(
    oracle: Callable[[Shape], Oracle], record_number: RecordNumber, shape: Shape
) -> None:
    base = oracle(shape)
    stage = make_stage(base)
    for parameter in stage.lora_parameters():
        parameter.tensor.data.zero_()
    rows = make_rows(LENGTHS, seed=1)
    batch = make_batch(rows)
    with torch.no_grad():
        seen = stage.logits(stage.hidden(None, batch), batch).view(len(rows), batch.width, -1)
    differences = []
    for row, seen_LV in zip(rows, seen, strict=True):
        start = 0
        for document in row:
            expected = logits(base.model, document.token_ids.tolist())
            differences.append((seen_LV[start : start + len(document)] - expected).abs().max().item())
            start += len(document)
    assert len(differences) == sum(map(len, LENGTHS))
    record_number(f"{shape.name}: training stage, logits vs transformers", max(differences), at_most=1e-4)


def test_the_first_document_of_a_row_does_not_know_of_the_second(oracle: Callable[[Shape], Oracle]) -> None:
    """And the other way round: exchanging one document changes the logits of no other."""
    stage = make_stage(oracle(V3))
    (first, second), (other, _) = make_rows(((20, 24), (24, 20)), seed=2)
    seen = []
    for row in ((first, second), (first, other)):
        batch = make_batch([row])
        with torch.no_grad():
            seen.append(stage.logits(stage.hidden(None, batch), batch))
    torch.testing.assert_close(seen[0][:20], seen[1][:20], atol=1e-5, rtol=1e-5)
    assert (seen[0][20:44] - seen[1][20:44]).abs().max() > 0.1
