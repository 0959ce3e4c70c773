"""Adapters in host memory: a bounded number of bytes, of which the least recently used leave first."""

from __future__ import annotations

from runtime.adapters.device_tier import TierCounts
from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.info import AdapterState
from runtime.adapters.record import AdapterRecord
from runtime.errors import Exhausted


class HostTier:
    """Which adapters have their pages in host memory. Those on the device may be here too: they come back faster."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.counts = TierCounts()
        self._records: set[AdapterRecord] = set()

    @property
    def used_bytes(self) -> int:
        """Bytes of all adapters here."""
        return sum(record.host_bytes for record in self._records)

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes are free, or are those of adapters that may leave."""
        leaving = sum(record.host_bytes for record in self._records if _may_leave(record))
        return num_bytes <= self.max_bytes - self.used_bytes + leaving

    def admit(self, record: AdapterRecord, host: HostAdapter) -> list[AdapterRecord]:
        """Keep an adapter's pages; returns those that had to leave for it. Raises Exhausted if there is no room."""
        victims: list[AdapterRecord] = []
        room = self.max_bytes - self.used_bytes
        candidates = sorted(filter(_may_leave, self._records - {record}), key=lambda record: record.age)
        while room < host.num_bytes:
            if not candidates:
                raise Exhausted(
                    f"host memory for adapters is full: {host.num_bytes} bytes needed, {room} of {self.max_bytes} free "
                    "or to be freed; unload or unpin an adapter, or raise --adapter-host-memory-gib",
                    reason="ADAPTER_HOST_MEMORY_FULL",
                )
            victims.append(candidates.pop(0))
            room += victims[-1].host_bytes
        for victim in victims:
            self.counts.evictions += 1
            self.remove(victim)
        record.host = host
        self._records.add(record)
        self.counts.loads += 1
        return victims

    def remove(self, record: AdapterRecord) -> int:
        """Free an adapter's pages here; returns how many bytes came back."""
        freed = record.host_bytes
        self._records.discard(record)
        record.host = None
        if record.state is AdapterState.READY and not record.is_resident:
            record.state = AdapterState.REGISTERED
        return freed


def _may_leave(record: AdapterRecord) -> bool:
    """What is on the device needs no copy here; what is not may go if nobody needs it."""
    if record.slot >= 0 and not record.is_resident:
        return False
    return record.is_resident or (record.state is AdapterState.READY and not record.references and not record.pinned)
