"""The micro-batches of one optimizer step that fall to this process's replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.distributed.mesh import Group
from runtime.trainer.config import TrainConfig
from runtime.trainer.data.batch import collate
from runtime.trainer.data.documents import Document
from runtime.trainer.data.rows import RowStream
from runtime.trainer.micro_batch import MicroBatch, make_micro_batch

Row = tuple[Document, ...]


@dataclass(frozen=True)
class StepData:
    """`num_tokens` and `num_targets` count the whole step, over all replicas."""

    micro_batches: list[MicroBatch]
    num_tokens: int
    num_targets: int


def step_data(config: TrainConfig, rows: Sequence[Row], first_row: int, dp: Group, device: torch.device) -> StepData:
    """Rows in turn to the replicas, micro-batch by micro-batch; `rows` are all rows of the step, in the run's order.

    The loss is a sum over tokens divided by the step's targets, so no split of the rows changes it.
    """
    num_targets = sum(num_target_tokens(row) for row in rows)
    size = config.micro_batch_rows
    own = [start for index, start in enumerate(range(0, len(rows), size)) if index % dp.size == dp.rank]
    width = row_width(config) if config.parallel.pp > 1 else None
    micro_batches = [
        make_micro_batch(
            collate(rows[start : start + size], width),
            device,
            rows=range(first_row + start, first_row + min(start + size, len(rows))),
            row_tokens=config.data.max_length,
            loss_weight=1 / max(1, num_targets),
            row_weight=1 / len(rows),
        )
        for start in own
    ]
    num_tokens = sum(len(document) for row in rows for document in row)
    return StepData(micro_batches, num_tokens, num_targets)


def row_width(config: TrainConfig) -> int:
    """The one width of all rows where pipeline stages need to know it beforehand."""
    return -(-config.data.max_length // 8) * 8


def num_target_tokens(row: Row) -> int:
    """Tokens of a row that the loss is taken over; a document's first token has nothing to be predicted from."""
    return sum(int(document.is_target[1:].sum()) for document in row)


def mean_row(config: TrainConfig, documents: Sequence[Document]) -> tuple[float, float]:
    """(tokens, target tokens) of a row of the first epoch, on average."""
    stream = RowStream(documents, config.data, config.seed)
    num_rows = stream.num_rows(1)
    num_tokens = sum(len(document) for document in documents)
    return num_tokens / num_rows, num_target_tokens(tuple(documents)) / num_rows
