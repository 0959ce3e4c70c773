"""The memory of one adapter's pages while a reading process makes them: tensors side by side in a segment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.adapters.segments import Segment, SegmentStock
from runtime.adapters.shared_pages import Place, tensor_over

_ALIGNED_BYTES = 64


class SharedArena:
    """Tensors of `new_pages` lie in one segment of the stock when they are lent. Use it in `with`."""

    def __init__(self, stock: SegmentStock) -> None:
        self._stock = stock
        self._segment: Segment | None = None
        self._outgrown: list[Segment] = []
        self._num_expected_bytes = self._num_bytes = 0
        self._offsets: dict[int, int] = {}

    def __enter__(self) -> SharedArena:
        return self

    def __exit__(self, *_: object) -> None:
        """What was not lent is used again."""
        for segment in [*self._outgrown, *([self._segment] if self._segment else [])]:
            self._stock.put_back(segment)

    def expect(self, num_bytes: int) -> None:
        """Take a segment for about so much."""
        if self._segment is None:
            self._num_expected_bytes = num_bytes
            self._segment = self._stock.take(num_bytes)

    def new_pages(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any bytes: the memory may have been another adapter's. Raises OSError if there is no more."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            raise ValueError(f"a page cannot have the shape {list(shape)}")
        self.expect(0)
        segment = self._current()
        offset = self._fitting_offset(segment, num_bytes)
        if offset is None and not segment.can_grow:
            # The engine maps it as it is: what is in it moves to a larger one when it is placed.
            self._outgrown.append(segment)
            self._offsets = {}
            self._num_bytes = 0
            segment = self._segment = self._stock.take(0)
        if offset is None:
            offset = segment.num_bytes
            segment.grow(num_bytes)
        start, memory = next(part for part in reversed(segment.parts) if part[0] <= offset)
        tensor = tensor_over(memory, shape, offset - start, dtype)
        self._num_bytes = offset + num_bytes
        self._offsets[tensor.data_ptr()] = offset
        return tensor

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor lies; one that lies elsewhere is copied here first."""
        if tensor.data_ptr() not in self._offsets:
            tensor = self.new_pages(tensor.shape, tensor.dtype).copy_(tensor)
        return Place(tuple(tensor.shape), self._offsets[tensor.data_ptr()])

    def lend(self) -> tuple[int, int | None]:
        """The segment's number, and its descriptor if the engine has not mapped it; call `lent` when it is told."""
        self.expect(0)
        segment = self._current()
        return segment.number, segment.settle(self._num_bytes)

    def lent(self) -> None:
        """The engine has it."""
        self._stock.lend(self._current(), self._num_expected_bytes, self._num_bytes)
        self._segment = None

    def _fitting_offset(self, segment: Segment, num_bytes: int) -> int | None:
        """Where the next tensor fits into what there is, whose last mapping is the only one with room; None if not."""
        offset = -(-self._num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return offset if offset + num_bytes <= segment.num_bytes else None

    def _current(self) -> Segment:
        if self._segment is None:
            raise ValueError("this memory has been lent")
        return self._segment
