"""The order of training: every row of every epoch by one global index, so any process can make any row."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.trainer.config import DataConfig
from runtime.trainer.data.documents import DataError, Document

_OPEN_ROWS = 64  # how many rows wait for a document that still fits
_CACHED_EPOCHS = 2  # the running one, and the next, which a batch across their border needs


@dataclass(frozen=True)
class _Epoch:
    """Row i holds the documents `order[starts[i] : starts[i + 1]]`."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]


class RowStream:
    """Rows of at most `data.max_length` tokens, epoch after epoch; the same for the same documents, config and seed.

    Each epoch is shuffled by a seed of its own and then packed, so epochs can differ in their number of rows.
    """

    def __init__(self, documents: Sequence[Document], data: DataConfig, seed: int) -> None:
        """Raises DataError if there are no documents, or one is longer than a row."""
        if not documents:
            raise DataError("there are no documents to train on")
        self._documents = documents
        self._lengths = np.fromiter((len(document) for document in documents), np.int64, len(documents))
        if self._lengths.max() > data.max_length:
            raise DataError(f"a document of {self._lengths.max()} tokens is longer than a row of {data.max_length}")
        self._data, self._seed = data, seed
        self._first_rows = [0]  # of epoch e, as far as known
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def row(self, index: int) -> tuple[Document, ...]:
        """The documents of row `index` (from 0) of the training order, at least one."""
        epoch_index, first_row = self._locate(index)
        epoch = self._epoch(epoch_index)
        start, end = epoch.starts[index - first_row : index - first_row + 2]
        return tuple(self._documents[n] for n in epoch.order[start:end])

    def num_rows(self, epochs: float) -> int:
        """Rows of the first `epochs` epochs; a part of an epoch is rounded up to whole rows."""
        whole = math.floor(epochs)
        partial = epochs - whole
        first_row = self._first_row(whole)
        return first_row + (math.ceil(partial * (self._first_row(whole + 1) - first_row)) if partial else 0)

    def epoch_of(self, index: int) -> float:
        """How many epochs are done before row `index`: 1.5 is the middle of the second."""
        epoch_index, first_row = self._locate(index)
        return epoch_index + (index - first_row) / (self._first_row(epoch_index + 1) - first_row)

    def _locate(self, index: int) -> tuple[int, int]:
        """The epoch that row `index` is in, and that epoch's first row."""
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        while self._first_rows[-1] <= index:
            self._first_row(len(self._first_rows))
        epoch_index = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return epoch_index, self._first_rows[epoch_index]

    def _first_row(self, epoch_index: int) -> int:
        while len(self._first_rows) <= epoch_index:
            num_rows = len(self._epoch(len(self._first_rows) - 1).starts) - 1
            self._first_rows.append(self._first_rows[-1] + num_rows)
        return self._first_rows[epoch_index]

    def _epoch(self, epoch_index: int) -> _Epoch:
        if epoch_index not in self._epochs:
            self._epochs[epoch_index] = self._arrange(epoch_index)
            if len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch_index)
        return self._epochs[epoch_index]

    def _arrange(self, epoch_index: int) -> _Epoch:
        order = np.arange(len(self._lengths))
        if self._data.shuffle:
            # Numbers of the bit generator itself: numpy promises that these never change, unlike its permutations.
            keys = np.random.PCG64([self._seed, epoch_index]).random_raw(len(order))
            order = np.argsort(keys, kind="stable")
        if not self._data.pack:
            return _Epoch(order, np.arange(len(order) + 1))
        row_of = pack(self._lengths[order], self._data.max_length)
        starts = np.concatenate(([0], np.cumsum(np.bincount(row_of))))
        return _Epoch(order[np.argsort(row_of, kind="stable")], starts)


def pack(lengths: NDArray[np.int64], max_length: int) -> NDArray[np.int64]:
    """The row of each document [n], rows numbered as they are begun: first fit among the rows still open.

    When as many rows are open as are allowed, the fullest is closed for a new one.
    """
    room = np.zeros(_OPEN_ROWS, np.int64)
    rows = np.full(_OPEN_ROWS, -1, np.int64)
    row_of = np.empty(len(lengths), np.int64)
    num_rows = 0
    for n, length in enumerate(lengths):
        slot = (room >= length).argmax()
        if room[slot] < length:
            slot = room.argmin()
            room[slot], rows[slot] = max_length, num_rows
            num_rows += 1
        room[slot] -= length
        row_of[n] = rows[slot]
    return row_of
