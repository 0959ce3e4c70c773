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
    def _starts(self) -> list[int]:
        """Where each begins in memory of `dtype`, in numbers."""
        size = self.dtype.itemsize if self.dtype else 1
        return [(tensor.offset - self.offset) // size for tensor in self.tensors]

    @cached_property
    def _first_numbers(self) -> tuple[list[str], torch.Tensor]:
        """Keys of tensors that have numbers, and where the first one lies."""
        starts = zip(self.tensors, self._starts, strict=True)
        found = {tensor.name: start for tensor, start in starts if tensor.num_bytes}
        return list(found), torch.tensor(list(found.values()), dtype=torch.long)

    @cached_property
    def _stacks(self) -> list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], int]]:
        """Keys, shape, strides and start of tensors of one shape at equal distances: those of one expert come again."""
        shapes, starts = [tensor.shape for tensor in self.tensors], self._starts
        period = next(period for period in range(1, len(shapes) + 1) if shapes[period:] == shapes[:-period])
        distance = starts[period] if period < len(starts) else 0
        stacks = []
        for first, shape in enumerate(shapes[:period]):
            names = self.names[first::period]
            stacks.append((names, (len(names), *shape), (distance, *_strides(shape)), starts[first]))
        return stacks

    def begin_with_zero(self, memory: torch.Tensor) -> list[str]:
        """Keys of the tensors whose first number is 0: none else can be all zero."""
        names, places = self._first_numbers
        return [names[index] for index in memory[places].eq(0).nonzero().flatten().tolist()]

    def split(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by key, in `memory` [numbers of `dtype`], which they share."""
        tensors: dict[str, torch.Tensor] = {}
        for names, shape, strides, start in self._stacks:
            tensors.update(zip(names, memory.as_strided(shape, strides, start).unbind(), strict=True))
        return tensors


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
