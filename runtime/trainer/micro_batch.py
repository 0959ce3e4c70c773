"""One micro-batch as a stage computes it: tokens of all its rows, flat, and where each document lies.

Shape suffixes: T tokens of the micro-batch (rows x width), N tokens of one bucket, padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.trainer.data.batch import Batch

MIN_BUCKET_TOKENS = 16


@dataclass(frozen=True)
class DocumentBucket:
    """Documents of similar length, padded to one; `rows_N` are their tokens, document by document (None: all)."""

    num_documents: int
    num_tokens: int
    rows_N: Tensor | None


@dataclass(frozen=True)
class Documents:
    """All documents in buckets; `slot_T` is each token's place in the joined buckets (None: the same order)."""

    buckets: tuple[DocumentBucket, ...]
    slot_T: Tensor | None


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Index tensors are int64 on the device; `targets_T` is IGNORED where nothing is learnt.

    `ids_T` are the tokens' places in the run (what dropout hashes), `is_real_T` tells tokens from padding, `lengths`
    are the document lengths of each row. A loss sum counts `loss_weight`, one over the step's target tokens; a row's
    balance loss counts `row_weight`, one over the step's rows.
    """

    token_ids_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    ids_T: Tensor
    is_real_T: Tensor
    lengths: tuple[tuple[int, ...], ...]
    num_rows: int
    documents: Documents
    loss_weight: float
    row_weight: float

    @property
    def has_padding(self) -> bool:
        """Whether a row has fewer tokens than the width."""
        return sum(map(sum, self.lengths)) < self.token_ids_T.shape[0]

    @property
    def width(self) -> int:
        """Tokens of one row, padding included."""
        return self.token_ids_T.shape[0] // self.num_rows


def make_micro_batch(
    batch: Batch, device: torch.device, *, rows: Sequence[int], row_tokens: int, loss_weight: float, row_weight: float
) -> MicroBatch:
    """`rows` are the places of the batch's rows in the run, `row_tokens` the tokens that each of them may have."""
    num_rows, width = batch.token_ids_BL.shape
    used_B = torch.tensor([sum(lengths) for lengths in batch.lengths])
    places_L = torch.arange(width)
    ids_BL = torch.tensor(rows)[:, None] * row_tokens + places_L
    return MicroBatch(
        token_ids_T=batch.token_ids_BL.flatten().to(device),
        targets_T=batch.targets_BL.flatten().to(device),
        positions_T=batch.positions_BL.flatten().to(device),
        ids_T=ids_BL.flatten().to(device),
        is_real_T=(places_L < used_B[:, None]).flatten().to(device),
        lengths=batch.lengths,
        num_rows=num_rows,
        documents=bucket_documents(batch.lengths, width, device),
        loss_weight=loss_weight,
        row_weight=row_weight,
    )


def bucket_documents(lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> Documents:
    """Group the documents of rows of `width` tokens by length, to powers of two, so that little is padded."""
    if all(len(row) == 1 and row[0] == width for row in lengths):
        return Documents((DocumentBucket(len(lengths), width, None),), None)
    members: dict[int, list[tuple[int, int]]] = {}
    for index, row in enumerate(lengths):
        start = index * width
        for length in row:
            members.setdefault(_padded(length, width), []).append((start, length))
            start += length
    slot_T = torch.zeros(len(lengths) * width, dtype=torch.int64)
    buckets, num_before = [], 0
    for padded, documents in sorted(members.items()):
        starts_D = torch.tensor([start for start, _ in documents])
        lengths_D = torch.tensor([length for _, length in documents])
        places_P = torch.arange(padded)
        is_token_DP = places_P < lengths_D[:, None]
        # Past a document's end its last token is repeated: later places are never seen by earlier ones.
        rows_DP = starts_D[:, None] + torch.minimum(places_P[None], lengths_D[:, None] - 1)
        slots_DP = num_before + torch.arange(rows_DP.numel()).view_as(rows_DP)
        slot_T[rows_DP[is_token_DP]] = slots_DP[is_token_DP]
        buckets.append(DocumentBucket(len(documents), padded, rows_DP.flatten().to(device)))
        num_before += rows_DP.numel()
    return Documents(tuple(buckets), slot_T.to(device))


def _padded(length: int, width: int) -> int:
    return min(width, max(MIN_BUCKET_TOKENS, 1 << (length - 1).bit_length()))
