"""When the memory of vacant pages is given back: at once if nothing runs, else after a while and piece by piece."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import torch

from runtime.adapters.device_pages import DevicePages

logger = logging.getLogger(__name__)

# Under traffic vacant pages wait so long for an adapter that can use them.
VACANT_SECONDS = 2.0
# If the device has no room to copy what stays, so long for the next attempt.
RETRY_SECONDS = 10.0


class Compaction:
    """Owned by the device tier, which tells it when pages may have become vacant and when adapters come in."""

    def __init__(self, pages: DevicePages) -> None:
        self._pages = pages
        self._pieces: Iterator[None] | None = None
        self._due = math.inf
        self._not_before = 0.0

    @property
    def due(self) -> float:
        """When vacant pages have waited long enough, on the monotonic clock; infinity if there are none."""
        return max(self._due, self._not_before)

    @property
    def can_run(self) -> bool:
        """Whether `advance(whole=True)` would do anything."""
        return self._pages.vacant_bytes > 0 and time.monotonic() >= self._not_before

    def note(self) -> None:
        """Pages have become vacant, or vacant ones have been used."""
        if not self._pages.vacant_bytes:
            self._due = math.inf
        elif self._due == math.inf:
            self._due = time.monotonic() + VACANT_SECONDS

    def stop(self) -> None:
        """An adapter comes, which may use what is vacant; what has been copied of one pool is dropped."""
        self._pieces = None

    def advance(self, *, whole: bool) -> None:
        """Give all vacant pages back, or one piece of them if they are due. Not while adapters are copied."""
        if not self.can_run or (not whole and time.monotonic() < self._due):
            return
        pieces = self._pieces = self._pieces or self._pages.compact()
        try:
            for _ in pieces:
                if not whole:
                    return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no room on the device to compact adapter pages; trying again in %g s", RETRY_SECONDS)
            self._not_before = time.monotonic() + RETRY_SECONDS
        self._pieces = None
        self._due = math.inf
        self.note()


def is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no class of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
