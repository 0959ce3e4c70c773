"""Adapters are read beside the engine loop: folders by a `ReadsFolders`, and weighted sums made of what is read."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from runtime.adapters.compose import compose, joined_bytes
from runtime.adapters.expression import weight_text
from runtime.adapters.folder_reader import ReadAdapter, ReadsFolders, as_graft_error, facts_of, printable
from runtime.adapters.record import Source
from runtime.errors import Exhausted, GraftError, Precondition
from runtime.ops.cpu_threads import compute_on_one_core

__all__ = ["AdapterReader", "OnRead", "ReadAdapter", "SumLimits", "as_changed", "printable"]

# A long step lends cores for no longer than one of 0.1 s does; a folder of 66 MB takes two of them for 40 ms.
MAX_LENT_SECONDS = 0.025

OnRead = Callable[[ReadAdapter | GraftError], None]


@dataclass(frozen=True)
class SumLimits:
    """Sums with larger joined ranks or more bytes of pages are refused."""

    max_joined_rank: int
    max_bytes: int


class AdapterReader:
    """One thread; results wait until the engine loop takes them with `deliver`. `wake` is called when one has come.

    The thread reads folders itself, or waits for a process that does, as `folders` is one or the other; sums of
    adapters it makes itself. `core_share`: see `lend_cores`.
    """

    def __init__(
        self, folders: ReadsFolders, limits: SumLimits, wake: Callable[[], None], core_share: float = 0.0
    ) -> None:
        self.folders = folders
        self._limits = limits
        self._wake = wake
        self._core_share = core_share
        self._num_unread = 0
        self._has_read = threading.Event()
        # Sums are made in it: with threads of its own for them it would hold up the steps' threads.
        self._thread = ThreadPoolExecutor(1, "adapter-loader", initializer=compute_on_one_core)
        self._finished: queue.SimpleQueue[tuple[str, Future[ReadAdapter], OnRead]] = queue.SimpleQueue()
        self._thread.submit(folders.start)

    def read(self, name: str, source: Source, on_read: OnRead) -> None:
        """Start reading; a later `deliver` calls `on_read`, with an error if the digest is not the one given."""
        self._num_unread += 1
        future = self._thread.submit(self._read, name, source)
        future.add_done_callback(partial(self._hand_over, name, on_read))

    @property
    def has_news(self) -> bool:
        """Whether `deliver` would call anything."""
        return not self._finished.empty()

    def deliver(self) -> None:
        """Tell those that asked about everything that has been read."""
        self._has_read.clear()
        while not self._finished.empty():
            name, future, on_read = self._finished.get()
            self._num_unread -= 1
            error = future.exception()
            on_read(future.result() if error is None else as_graft_error(name, error))

    def lend_cores(self, step_seconds: float) -> None:
        """Called between two steps that compute on the cores that reading needs too: leave them to it for a while.

        That is a share of the step before, but not long, or until something has been read. A core that is taken from
        one thread of a step holds up all of them, so reading beside steps would cost them the sum of what its own
        threads take.
        """
        if self._core_share and self._num_unread:
            self._has_read.wait(min(self._core_share * step_seconds, MAX_LENT_SECONDS))

    def close(self) -> None:
        """Stop the thread, after its current file if it reads that itself."""
        self.folders.interrupt()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.folders.close()

    def _hand_over(self, name: str, on_read: OnRead, done: Future[ReadAdapter]) -> None:
        """Runs in the thread: the engine loop takes it from here."""
        if not done.cancelled():
            self._finished.put((name, done, on_read))
            self._has_read.set()
            self._wake()

    def _read(self, name: str, source: Source) -> ReadAdapter:
        """Runs in the thread."""
        if source.parts:
            return self._sum(name, source, time.monotonic())
        return self.folders.read(name, source.path, source.digest)

    def _sum(self, name: str, source: Source, started: float) -> ReadAdapter:
        """A weighted sum; parts that are not in memory are read, and are not kept."""
        reads: list[ReadAdapter] = []
        for _, part in source.parts:
            reads.append(self._read_part(part))
            if reads[-1].host.replaced:
                message = (
                    f"adapter {name!r}: {part.label} is an ESFT adapter, whose experts take the place of the base's: "
                    "it cannot be a part of a sum, name it alone"
                )
                raise Precondition(message, reason="ADAPTER_REFUSED", field="adapter_id")
            num_bytes = joined_bytes([read.host for read in reads], self._limits.max_joined_rank)
            if num_bytes > self._limits.max_bytes:
                message = (
                    f"adapter {name!r} takes {num_bytes} bytes on the device or more, beyond the "
                    f"{self._limits.max_bytes} that all adapters may take: raise --adapter-memory-gib"
                )
                raise Exhausted(message, reason="ADAPTER_MEMORY_FULL")
        weights = [weight for weight, _ in source.parts]
        shares = [(float(weight), read.host) for weight, read in zip(weights, reads, strict=True)]
        host = compose(shares, self._limits.max_joined_rank)
        lines = sorted(f"{weight_text(weight)} {read.digest}" for weight, read in zip(weights, reads, strict=True))
        digest = "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
        warnings = [
            f"{part.label}: {warning}"
            for (_, part), read in zip(source.parts, reads, strict=True)
            for warning in read.facts.warnings
        ]
        facts = facts_of(host, sum(read.facts.tensor_bytes for read in reads), warnings)
        digests = tuple(read.digest for read in reads)
        return ReadAdapter(digest, host, facts, time.monotonic() - started, digests)

    def _read_part(self, part: Source) -> ReadAdapter:
        """A part's pages, from memory if they are there; errors name the part."""
        if part.host is not None:
            return ReadAdapter(part.digest, part.host, part.facts, 0.0)
        try:
            return self._read(part.label, part)
        except Precondition as error:
            raise as_changed(part.label, error) from error


def as_changed(label: str, error: GraftError) -> GraftError:
    """A generation stands for its bytes: when the files are others now, it cannot be read again."""
    if error.reason != "DIGEST_MISMATCH":
        return error
    message = f"the files of adapter {label!r} are not those that were loaded: load it again with replace"
    return Precondition(message, reason="ADAPTER_FILES_CHANGED")
