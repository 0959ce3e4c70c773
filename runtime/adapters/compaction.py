"""When vacant pages are given back and young pools merged: at once if nothing runs, else in time and piece by piece."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import torch

from runtime.adapters.device_pages import DevicePages

logger = logging.getLogger(__name__)

# Under traffic both happen when no adapter has come or left for so long: while some do, others can use vacant pages,
# and giving them back and getting them again would copy all that stays each time.
QUIET_SECONDS = 10.0
# While many come and leave young pools are merged after so long: steps need a product more for each. One that comes
# breaks off the pool that is being merged; after that there is time for others before it is tried again.
MAX_YOUNG_SECONDS = 60.0
# If the device has no room to copy what stays, so long for the next attempt.
RETRY_SECONDS = 10.0
# Where nothing runs, more than a piece is done at a time, but a request that comes meanwhile waits no longer than that.
MAX_IDLE_SECONDS = 0.05


class Compaction:
    """Owned by the device tier, which tells it when adapters have come and left."""

    def __init__(self, pages: DevicePages) -> None:
        self._pages = pages
        self._pieces: Iterator[None] | None = None
        self._quiet_at = math.inf
        self._merge_at = math.inf
        self._not_before = 0.0

    @property
    def due(self) -> float:
        """When there will be something to do in traffic, on the monotonic clock; infinity if there is nothing."""
        return max(min(self._quiet_at, self._merge_at), self._not_before)

    @property
    def can_run(self) -> bool:
        """Whether `advance(whole=True)` would do anything."""
        return self._quiet_at < math.inf and time.monotonic() >= self._not_before

    def note(self) -> None:
        """An adapter has come or left."""
        now = time.monotonic()
        has_young = self._pages.has_young
        self._quiet_at = now + QUIET_SECONDS if has_young or self._pages.vacant_bytes else math.inf
        self._merge_at = min(self._merge_at, now + MAX_YOUNG_SECONDS) if has_young else math.inf

    def stop(self) -> None:
        """An adapter comes, which may use what is vacant; what has been copied of one pool is dropped."""
        if self._pieces is not None and self._merge_at < math.inf:
            self._merge_at = max(self._merge_at, time.monotonic() + QUIET_SECONDS)
        self._pieces = None

    def advance(self, *, whole: bool) -> None:
        """One piece of what is due, or pieces of all that there is for a while. Not while adapters are copied."""
        now = time.monotonic()
        if not self.can_run or (not whole and now < self.due):
            return
        if self._pieces is None:
            is_quiet = whole or now >= self._quiet_at
            self._pieces = self._pages.compact() if is_quiet else self._pages.merge()
        try:
            for _ in self._pieces:
                if not whole or time.monotonic() - now > MAX_IDLE_SECONDS:
                    return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no room on the device to compact adapter pages; trying again in %g s", RETRY_SECONDS)
            self._not_before = time.monotonic() + RETRY_SECONDS
        self._pieces = None
        self.note()


def is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no class of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
