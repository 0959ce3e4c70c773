"""Rows -> one batch of token ids, targets and positions, with padding only at the end of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runtime.trainer.data.documents import Document

IGNORED = -100  # a target that adds nothing to the loss
_WIDTH_MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of L tokens, all int64. `lengths`: per row, the tokens of each of its documents; the rest is padding.

    `targets_BL[b, i]` is token i + 1 of the same document if that is learnt, else IGNORED; `positions_BL` restart at
    0 with each document.
    """

    token_ids_BL: torch.Tensor
    targets_BL: torch.Tensor
    positions_BL: torch.Tensor
    lengths: tuple[tuple[int, ...], ...]

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is taken over."""
        return int((self.targets_BL != IGNORED).sum())


def collate(rows: Sequence[tuple[Document, ...]], width: int | None = None) -> Batch:
    """Lay rows out in a batch of `width` tokens; None: the longest row, rounded up to a multiple of 8.

    Raises ValueError without rows, or for a row that is longer than `width`.
    """
    lengths = tuple(tuple(len(document) for document in row) for row in rows)
    longest = max((sum(row) for row in lengths), default=0)
    if longest == 0:
        raise ValueError("a batch needs at least one row with at least one token")
    if width is None:
        width = -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    if longest > width:
        raise ValueError(f"a row of {longest} tokens does not fit into a batch of width {width}")
    token_ids_BL = np.zeros((len(rows), width), np.int64)
    targets_BL = np.full((len(rows), width), IGNORED, np.int64)
    positions_BL = np.zeros((len(rows), width), np.int64)
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document)
            token_ids_BL[b, start:end] = document.token_ids
            targets_BL[b, start : end - 1] = np.where(document.is_target, document.token_ids, IGNORED)[1:]
            positions_BL[b, start:end] = np.arange(len(document))
            start = end
    return Batch(
        torch.from_numpy(token_ids_BL), torch.from_numpy(targets_BL), torch.from_numpy(positions_BL), lengths
    )
