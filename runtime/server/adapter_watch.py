"""What one watcher of adapters has not taken yet: a snapshot and the changes after it, in order and bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeAlias

from runtime.adapters.info import AdapterInfo
from runtime.errors import Exhausted, GraftError

MAX_QUEUED_CHANGES = 1000

# None ends the snapshot.
WatchItem: TypeAlias = AdapterInfo | None


class AdapterWatch:
    """Fed by the client of the engine. A watcher for whom too many changes wait loses them all and is told so.

    One that is stuck in gRPC by then, because nothing is read there, is taken out, so that it holds nothing any more.
    """

    def __init__(self, max_queued: int = MAX_QUEUED_CHANGES) -> None:
        self._max_queued = self._limit = max_queued
        self._items: deque[WatchItem] = deque()
        self._has_begun = False
        self._failure: GraftError | None = None
        self._arrival = asyncio.Event()
        self._is_awaited = False
        self._reader: asyncio.Task[object] | None = None
        self._is_lost = False

    def begin(self, adapters: list[AdapterInfo]) -> None:
        """The snapshot, which knows of every change before it."""
        self._items.extend([*adapters, None])
        self._limit += len(self._items)
        self._has_begun = True
        self._arrival.set()

    def change(self, adapter: AdapterInfo) -> None:
        """A change; those before the snapshot are in it."""
        if not self._has_begun or self._failure is not None:
            return
        self._items.append(adapter)
        self._arrival.set()
        if len(self._items) > self._limit:
            message = f"{self._max_queued} changes wait to be read, the most that may: watch again for a new snapshot"
            self._items.clear()
            self.end(Exhausted(message, reason="WATCHER_TOO_SLOW", retry_seconds=0.0))
            if self._reader is not None and not self._is_awaited:
                self._is_lost = True
                self._reader.cancel()

    def end(self, error: GraftError) -> None:
        """Nothing more comes; the watcher meets the error behind what came before."""
        self._failure = self._failure or error
        self._arrival.set()

    async def take(self) -> WatchItem:
        """The next adapter, or None where the snapshot ends; raises what ended the watch."""
        self._reader = asyncio.current_task()
        while not self._items:
            if self._failure is not None:
                raise self._failure
            self._arrival.clear()
            self._is_awaited = True
            try:
                await self._arrival.wait()
            finally:
                self._is_awaited = False
        item = self._items.popleft()
        if item is None:
            self._limit = self._max_queued
        return item

    def raise_if_lost(self) -> None:
        """For a watcher that was cancelled: raise the reason if its own slowness is it."""
        if self._is_lost and self._failure is not None and self._reader is not None:
            self._is_lost = False
            self._reader.uncancel()
            raise self._failure
