"""The engine's side of a reading process's segments: mapped once, given back when the last tensor over them is gone."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

from runtime.adapters.shared_pages import Memory, lease, map_memory


class LentPages:
    """Segments of one reading process by their numbers. `give_back` hears, in a thread, which are not used any more."""

    def __init__(self, give_back: Callable[[Sequence[int]], None]) -> None:
        self._give_back = give_back
        self._mapped: dict[int, Memory] = {}
        self._ended: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="adapter-pages", daemon=True).start()

    def take(self, number: int, fd: int | None) -> Memory:
        """The segment's memory, until the last tensor over it is gone; `fd`, which is closed, brings a new segment.

        Raises OSError if it cannot be mapped, or did not come.
        """
        if fd is not None:
            try:
                self._mapped[number] = map_memory(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
        if number not in self._mapped:
            raise OSError(f"the descriptor of segment {number} did not come: too many open files?")
        return lease(self._mapped[number], partial(self._ended.put, number))

    def forget(self, numbers: Sequence[int]) -> None:
        """These will not be lent again."""
        for number in numbers:
            self._mapped.pop(number, None)

    def close(self) -> None:
        """The process has ended: what is lent stays until its end, the rest is unmapped."""
        self._mapped.clear()
        self._ended.put(None)

    def _run(self) -> None:
        while (number := self._ended.get()) is not None:
            self._give_back([number])
