"""A reading process's memory for pages: segments that the engine maps too, used again when their adapters have left.

Getting memory from the system in pieces of 4 KiB takes longer than reading a file, so a segment whose adapter is gone
is kept for the next one of about its size, within bounds, and one is made ready while there is nothing to read.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections import OrderedDict
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from runtime.adapters.shared_pages import Memory, discard, map_memory, new_memory_file, populate

# Vacant segments may take so much, or as much as the last one that became vacant if that is more ...
MAX_VACANT_BYTES = 256 * 2**20
# ... and when nothing has been read for a while, so much.
MAX_READY_BYTES = 128 * 2**20
MAX_VACANT = 64
_MAX_WASTE, _FREE_WASTE_BYTES = 1.125, 2**16  # a segment serves an adapter that takes most of it
_PREPARED_BYTES = 2**20  # of a segment that is made ready, so much at a time
_MAX_REMEMBERED = 64


class Segment:
    """Memory that can grow until it is lent. `number` is its name in both processes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_bytes = 0
        self.parts: list[tuple[int, Memory]] = []
        self._fd: int | None = new_memory_file()
        self._filling: Future[None] | None = None

    @property
    def can_grow(self) -> bool:
        """Whether it has never been lent."""
        return self._fd is not None

    def fits(self, num_bytes: int) -> bool:
        """Whether it holds so many bytes and not many more."""
        return num_bytes <= self.num_bytes <= num_bytes * _MAX_WASTE + _FREE_WASTE_BYTES

    def grow(self, num_bytes: int) -> Memory:
        """Add so much, rounded up to pages, as a mapping of its own; raises OSError if there is no more."""
        if self._fd is None:
            raise ValueError(f"segment {self.number} is mapped by another process as large as it is")
        start, num_bytes = self.num_bytes, _round_up(num_bytes)
        os.ftruncate(self._fd, start + num_bytes)
        memory = map_memory(self._fd, num_bytes, start)
        self.parts.append((start, memory))
        self.num_bytes = start + num_bytes
        return memory

    def fill(self) -> None:
        """Let a thread get its memory from the system."""
        _, memory = self.parts[-1]
        self._filling = _thread().submit(populate, memory, 0, len(memory))

    def join(self) -> None:
        """Map it in one piece, as whoever takes it expects; raises OSError."""
        if self._fd is not None and len(self.parts) > 1:
            self.parts = [(0, map_memory(self._fd, self.num_bytes))]

    def settle(self, num_used_bytes: int) -> int | None:
        """The descriptor with which it is lent for the first time, None if the other process knows it.

        Before that it gives back what it has beyond what is used, and is mapped in one piece.
        """
        if self._fd is not None and (len(self.parts) > 1 or not self.fits(num_used_bytes)):
            self.num_bytes = _round_up(num_used_bytes)
            os.ftruncate(self._fd, self.num_bytes)
            self.parts = [(0, map_memory(self._fd, self.num_bytes))]
        return self._fd

    def close_file(self) -> None:
        """The other process has mapped it, or never will. A process has few descriptors and may have many adapters."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def discard(self) -> None:
        """Give its memory back, also where the other process still maps it."""
        if self._filling is not None:
            self._filling.result()
        for _, memory in self.parts:
            discard(memory)
        self.close_file()


class SegmentStock:
    """All segments of a reading process. `dropped` are numbers that the engine need not map any more."""

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self._lent: dict[int, Segment] = {}
        self._vacant: OrderedDict[int, Segment] = OrderedDict()
        self._numbers = itertools.count()
        self._taken_bytes: OrderedDict[int, int] = OrderedDict()
        self._last_bytes = 0

    @property
    def num_vacant_bytes(self) -> int:
        """Bytes that no adapter has."""
        return sum(segment.num_bytes for segment in self._vacant.values())

    def take(self, num_bytes: int) -> Segment:
        """A vacant segment for pages of about so many bytes, or a new one, which has begun to be got from the system.

        Without a number it is a new one of no bytes.
        """
        likely_bytes = self._taken_bytes.get(num_bytes, num_bytes)
        fitting = [segment for segment in self._vacant.values() if num_bytes and segment.fits(likely_bytes)]
        if fitting:
            return self._vacant.pop(min(fitting, key=lambda segment: segment.num_bytes).number)
        segment = Segment(next(self._numbers))
        if num_bytes:
            try:
                segment.grow(likely_bytes)
            except OSError:
                segment.close_file()
                raise
            segment.fill()
        return segment

    def lend(self, segment: Segment, num_expected_bytes: int, num_used_bytes: int) -> None:
        """The engine has it from now on; adapters of which as much is expected will use as much."""
        segment.close_file()
        self._lent[segment.number] = segment
        self._last_bytes = num_used_bytes
        self._taken_bytes[num_expected_bytes] = num_used_bytes
        if len(self._taken_bytes) > _MAX_REMEMBERED:
            self._taken_bytes.popitem(last=False)
        self._drop(MAX_VACANT_BYTES)

    def put_back(self, segment: Segment) -> None:
        """Nobody uses it."""
        try:
            segment.join()
        except OSError:
            segment.discard()
            self.dropped.append(segment.number)
            return
        self._vacant[segment.number] = segment
        self._drop(max(MAX_VACANT_BYTES, segment.num_bytes))

    def vacate(self, numbers: list[int]) -> None:
        """The engine has no tensor over these any more."""
        for number in numbers:
            self.put_back(self._lent.pop(number))

    def preparing(self) -> Generator[None, None, None]:
        """Make a segment ready for an adapter like the last one, unless one is there or it would be too large.

        Yields between pieces that take a millisecond; what is done when it is closed stays.
        """
        num_bytes = self._last_bytes
        if not 0 < num_bytes <= MAX_READY_BYTES or any(segment.fits(num_bytes) for segment in self._vacant.values()):
            return
        segment = Segment(next(self._numbers))
        try:
            memory = segment.grow(num_bytes)
        except OSError:  # the next file will say so, if it is still so
            segment.close_file()
            return
        try:
            for start in range(0, num_bytes, _PREPARED_BYTES):
                populate(memory, start, _PREPARED_BYTES)
                yield
        finally:
            self.put_back(segment)

    def shrink(self) -> None:
        """Keep what is ready for the next one, and no more."""
        self._drop(MAX_READY_BYTES)

    def _drop(self, max_bytes: int) -> None:
        while self.num_vacant_bytes > max_bytes or len(self._vacant) > MAX_VACANT:
            number, segment = self._vacant.popitem(last=False)
            segment.discard()
            self.dropped.append(number)


def _round_up(num_bytes: int) -> int:
    return -(-max(1, num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


@lru_cache(maxsize=1)
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "adapter-segments")
