"""Tensors that lie side by side in a file: read, hashed and checked as one piece of memory."""

import math
from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from loaders.safetensors_file import StoredTensor

MAX_RUN_BYTES = 4 * 1024 * 1024  # of more than one tensor


@dataclass(frozen=True)
class Run:
    """Tensors in file order without a hole between them, all of type `dtype`; it is None for ones to hash only."""

    tensors: tuple[StoredTensor, ...]
    dtype: torch.dtype | None

    @property
    def offset(self) -> int:
        """Where the first one begins in the file."""
        return self.tensors[0].offset

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Their keys."""
        return tuple(tensor.name for tensor in self.tensors)

    @cached_property
    def _places(self) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Shape, strides and start of each in memory of `dtype`."""
        size = self.dtype.itemsize if self.dtype else 1
        return [(t.shape, _strides(t.shape), (t.offset - self.offset) // size) for t in self.tensors]

    @cached_property
    def _starts(self) -> tuple[list[str], torch.Tensor]:
        """Keys of tensors that have numbers, and where the first one lies."""
        places = zip(self.tensors, self._places, strict=True)
        starts = {tensor.name: start for tensor, (_, _, start) in places if tensor.num_bytes}
        return list(starts), torch.tensor(list(starts.values()), dtype=torch.long)

    def begin_with_zero(self, memory: torch.Tensor) -> list[str]:
        """Keys of the tensors whose first number is 0: none else can be all zero."""
        names, starts = self._starts
        return [names[index] for index in memory[starts].eq(0).nonzero().flatten().tolist()]

    def split(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in `memory` [numbers of `dtype`], which they share."""
        return [memory.as_strided(*place) for place in self._places]


def runs_of(tensors: Iterable[StoredTensor], wanted: Set[str]) -> tuple[Run, ...]:
    """All tensors in file order; those that are wanted alike and of one type together, up to MAX_RUN_BYTES."""
    runs: list[Run] = []
    for dtype, group in groupby(tensors, lambda tensor: tensor.dtype if tensor.name in wanted else None):
        run: list[StoredTensor] = []
        for tensor in group:
            if run and tensor.offset + tensor.num_bytes - run[0].offset > MAX_RUN_BYTES:
                runs.append(Run(tuple(run), dtype))
                run = []
            run.append(tensor)
        runs.append(Run(tuple(run), dtype))
    return tuple(runs)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in numbers."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
