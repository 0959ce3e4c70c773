"""Loss and exact match on the evaluation documents, each scored once whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.distributed.mesh import sum_numbers
from runtime.trainer.config import TrainConfig
from runtime.trainer.data.documents import Document
from runtime.trainer.data.rows import RowStream
from runtime.trainer.loss import TargetLosses
from runtime.trainer.micro_batch import MicroBatch
from runtime.trainer.pipeline import forward_only
from runtime.trainer.stage import TrainingStage
from runtime.trainer.step_data import Row, step_data


@dataclass(frozen=True)
class Evaluation:
    """`loss`: the mean over target tokens; `exact_match`: the share of documents whose targets are all likeliest.

    That is what greedy decoding of the learnt parts would get right to the letter.
    """

    loss: float
    exact_match: float
    num_documents: int
    num_targets: int


def evaluate(config: TrainConfig, documents: Sequence[Document], stage: TrainingStage) -> Evaluation:
    """Score all documents; every process calls this and gets the result."""
    data = replace(config.data, shuffle=False)
    stream = RowStream(documents, data, seed=0)
    rows = [stream.row(index) for index in range(stream.num_rows(1))]
    sums = [0.0, 0.0, 0.0, 0.0]
    stage.eval()
    for micro_batches in _turns(config, rows, stage):
        for batch, hidden_TH in forward_only(stage, micro_batches):
            if stage.is_last and stage.mesh.tp.rank == 0:
                with torch.no_grad():
                    scored = _scored(batch, stage.losses(hidden_TH, batch))
                sums = [before + new for before, new in zip(sums, scored, strict=True)]
            elif stage.is_last:
                with torch.no_grad():
                    stage.losses(hidden_TH, batch)  # the other processes' part of the vocabulary
    stage.train()
    loss, targets, exact, count = sum_numbers(sums, stage.mesh.world)
    return Evaluation(loss / max(1, targets), exact / max(1, count), int(count), int(targets))


def _turns(config: TrainConfig, rows: Sequence[Row], stage: TrainingStage) -> Iterator[list[MicroBatch]]:
    """Equal numbers of micro-batches for every replica, as exchanges between experts need; empty rows fill up."""
    dp, device = stage.mesh.dp, stage.placement.device
    per_turn = config.micro_batch_rows * dp.size
    filler = (Document(rows[0][0].token_ids[:1], rows[0][0].is_target[:1] & False),)
    padded = [*rows, *(filler for _ in range(-len(rows) % per_turn))]
    for start in range(0, len(padded), per_turn):
        yield step_data(config, padded[start : start + per_turn], start, dp, device).micro_batches


def _scored(batch: MicroBatch, found: TargetLosses) -> list[float]:
    """(loss sum, targets, exact documents, documents with targets)."""
    document_T = _document_numbers(batch)
    num_documents = int(document_T.max()) + 1 if document_T.numel() else 0
    documents_N = document_T[found.rows_N]
    wrong_D = torch.zeros(num_documents + 1, device=documents_N.device)
    wrong_D.index_add_(0, documents_N, (~found.is_best_N).float())
    targets_D = torch.zeros_like(wrong_D).index_add_(0, documents_N, torch.ones_like(documents_N, dtype=torch.float32))
    scored_D = targets_D > 0
    exact = int((scored_D & (wrong_D == 0)).sum())
    return [float(found.losses_N.double().sum()), float(len(documents_N)), float(exact), float(scored_D.sum())]


def _document_numbers(batch: MicroBatch) -> Tensor:
    """For each token the number of its document in the micro-batch; padding has that of the row's last one."""
    numbers: list[int] = []
    num_before = 0
    for row in batch.lengths:
        own = [num_before + index for index, length in enumerate(row) for _ in range(length)]
        numbers += own + own[-1:] * (batch.width - len(own))
        num_before += len(row)
    return torch.tensor(numbers, device=batch.token_ids_T.device)
