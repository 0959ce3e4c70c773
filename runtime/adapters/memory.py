"""Adapters on their way between disk, host memory and the device, as requests need them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from runtime.adapters.compaction import MAX_IDLE_SECONDS, is_out_of_memory
from runtime.adapters.device_tier import DeviceTier
from runtime.adapters.host_tier import HostTier
from runtime.adapters.info import AdapterState
from runtime.adapters.reader import AdapterReader, ReadAdapter, as_changed
from runtime.adapters.record import AdapterRecord
from runtime.errors import Exhausted, GraftError, Precondition

logger = logging.getLogger(__name__)

# After a failed read, requests are told so for this long before the files are read again.
RETRY_SECONDS = 5.0

OnSeated = Callable[[GraftError | None], None]


class AdapterMemory:
    """The tiers and the reader. `failures` are adapters that could not be brought, for the requests that wait.

    Adapters are read for requests one after the other. One that has been read while host memory is full of others that
    are needed waits beside them until there is room, and nothing more is read for requests before that.
    """

    def __init__(
        self, reader: AdapterReader, host: HostTier, device: DeviceTier, on_change: Callable[[AdapterRecord], None]
    ) -> None:
        self.reader = reader
        self.host = host
        self.device = device
        self.failures: list[tuple[AdapterRecord, GraftError]] = []
        self._on_change = on_change
        self._to_read: dict[AdapterRecord, None] = {}
        self._reading: AdapterRecord | None = None
        self._parked: ReadAdapter | None = None  # what was read for `_reading`
        self._on_seated: dict[AdapterRecord, OnSeated] = {}

    @property
    def has_work(self) -> bool:
        """Whether `advance` would do anything."""
        if self.device.is_installing or self.reader.has_news or self.device.can_seat:
            return True
        if time.monotonic() >= self.device.compaction.due:
            return True
        return self._parked is not None and self._can_unpark(self._parked)

    def bring(self, record: AdapterRecord) -> None:
        """A request or a pin needs an adapter on the device: read it if need be, and queue for a place."""
        if self.device.holds(record):
            return
        if record.host is not None:
            self.device.want(record)
        elif record is not self._reading:
            self._to_read[record] = None
            self._read_next()

    def waits(self, record: AdapterRecord) -> bool:
        """Whether it waits for room on the device or in host memory, and not for its files."""
        if record.is_yielding or record in self._to_read:
            return True
        has_been_read = record.host is not None or (record is self._reading and self._parked is not None)
        return has_been_read and not self.device.holds(record)

    def keep(self, record: AdapterRecord, read: ReadAdapter) -> None:
        """Take what was read into host memory; raises Exhausted if it cannot have room there or on the device."""
        self.check_size(record, read)
        _note_digests(record, read)
        record.digest, record.facts, record.load_seconds = read.digest, read.facts, read.seconds
        for victim in self.host.admit(record, read.host):
            self._on_change(victim)

    def check_size(self, record: AdapterRecord, read: ReadAdapter) -> None:
        """Raise Exhausted if it could not be on the device even alone."""
        num_bytes, limit = read.facts.page_bytes, self.device.max_bytes
        if num_bytes > limit:
            message = (
                f"adapter {record.name!r} takes {num_bytes} bytes on the device, more than the {limit} that "
                "all adapters may take: raise --adapter-memory-gib"
            )
            raise Exhausted(message, reason="ADAPTER_MEMORY_FULL")

    def seat(self, record: AdapterRecord, on_seated: OnSeated, *, evict: bool) -> bool:
        """Begin to copy to the device; `on_seated` is called when that is done or has failed. False: no place now."""
        if not self.device.seat(record, evict=evict):
            return False
        self._on_seated[record] = on_seated
        return True

    def advance(self, *, whole: bool) -> None:
        """Between two steps: take finished reads, give out places, and copy or compact a piece.

        If `whole`, because nothing runs, more pieces, for a bounded time.
        """
        begun = time.monotonic()
        self.reader.deliver()
        self.device.seat_wanted()
        if self._parked is not None and self._can_unpark(self._parked):
            self._take_in()
        while self.device.is_installing:
            finished = self.device.advance()
            if finished is not None:
                self._seated(*finished)
            elif not whole or time.monotonic() - begun > MAX_IDLE_SECONDS:
                return
        self.device.compaction.advance(whole=whole)

    def release(self, record: AdapterRecord) -> None:
        """No request holds it any more, so it needs no place."""
        if not record.pinned:
            self.device.unwant(record)
            self._to_read.pop(record, None)

    def drop(self, record: AdapterRecord) -> tuple[int, int]:
        """Free everything; returns how many bytes came back in host memory and on the device."""
        self._on_seated.pop(record, None)
        self._to_read.pop(record, None)
        on_device = self.device.remove(record)
        return self.host.remove(record), on_device

    def left_device(self, record: AdapterRecord) -> None:
        """Called for what was evicted: requests that wait for it queue again."""
        if record.host is None and record.state is AdapterState.READY:
            record.state = AdapterState.REGISTERED
        if record.references:
            self.bring(record)

    def _read_next(self) -> None:
        if self._reading is not None or not self._to_read:
            return
        self._reading = record = next(iter(self._to_read))
        del self._to_read[record]
        if record.state is AdapterState.REGISTERED:
            record.state = AdapterState.LOADING
            self._on_change(record)
        self.reader.read(record.name, record.source(), partial(self._brought, record))

    def _brought(self, record: AdapterRecord, read: ReadAdapter | GraftError) -> None:
        if isinstance(read, GraftError):
            self._fail(record, as_changed(record.label, read))
            return
        self._parked = read
        if self._can_unpark(read):
            self._take_in()

    def _can_unpark(self, read: ReadAdapter) -> bool:
        """Whether there is room for what was read, or never will be, or nobody needs it any more."""
        num_bytes = read.host.num_bytes
        return not self._is_needed(self._reading) or num_bytes > self.host.max_bytes or self.host.has_room(num_bytes)

    def _is_needed(self, record: AdapterRecord | None) -> bool:
        return record is not None and (record.references > 0 or record.pinned)

    def _take_in(self) -> None:
        record, read = self._reading, self._parked
        if record is None or read is None:
            return
        if not self._is_needed(record) and not self.host.has_room(read.host.num_bytes):
            self._let_go(record)
            return
        try:
            if record.state is not AdapterState.UNLOADED and record.host is None:
                self.keep(record, read)
        except GraftError as error:
            self._fail(record, error)
            return
        if record.state is AdapterState.LOADING:
            record.state = AdapterState.READY
        record.error = None
        self._reading = self._parked = None
        if record.state is not AdapterState.UNLOADED:
            self._on_change(record)
            if record.references or record.pinned:
                self.bring(record)
        self._read_next()

    def _let_go(self, record: AdapterRecord) -> None:
        """Those who needed it have gone, and there is no room: that is no failure, the next one has it read again."""
        self._reading = self._parked = None
        if record.state is AdapterState.LOADING:
            record.state = AdapterState.REGISTERED
        self._on_change(record)
        self._read_next()

    def _fail(self, record: AdapterRecord, error: GraftError) -> None:
        self._reading = self._parked = None
        if record.state is AdapterState.LOADING:
            record.state = AdapterState.REGISTERED
        record.error, record.retry_at = error, time.monotonic() + RETRY_SECONDS
        self.failures.append((record, error))
        self._on_change(record)
        self._read_next()

    def _seated(self, record: AdapterRecord, error: Exception | None) -> None:
        on_seated = self._on_seated.pop(record, None)
        refusal = None
        if error is not None:
            if not is_out_of_memory(error):
                raise error
            logger.error("adapter %r could not be copied to the device", record.label, exc_info=error)
            message = f"the device has no room for adapter {record.name!r} ({record.facts.device_bytes} bytes)"
            refusal = Exhausted(message, reason="DEVICE_MEMORY_FULL", retry_seconds=RETRY_SECONDS)
        if on_seated is not None:
            on_seated(refusal)
        elif refusal is not None:
            self.failures.append((record, refusal))


def _note_digests(record: AdapterRecord, read: ReadAdapter) -> None:
    """Generations that had not been read before stand for these bytes from now on."""
    parts = [part.record for part in record.parts]
    read_records = [(record, read.digest), *zip(parts, read.part_digests, strict=True)]
    for each, digest in read_records:
        if each.digest not in ("", digest):
            message = f"the files of adapter {each.label!r} changed while they were read: load it again with replace"
            raise Precondition(message, reason="ADAPTER_FILES_CHANGED")
    for each, digest in read_records:
        each.digest = digest
