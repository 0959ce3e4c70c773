"""Who waits for generations to be freed, and until when."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from runtime.adapters.info import AdapterInfo
from runtime.adapters.record import AdapterRecord
from runtime.errors import DeadlineExceeded, GraftError


@dataclass
class _Drain:
    """One caller of UnloadAdapter; `due` is on the monotonic clock. `told` is the last one freed that is no sum."""

    records: set[AdapterRecord]
    reply: Callable[[AdapterInfo | GraftError], None]
    due: float
    freed_host_bytes: int = 0
    freed_device_bytes: int = 0
    told: AdapterInfo | None = None


class Drains:
    """The unloads that are not done yet."""

    def __init__(self) -> None:
        self._drains: list[_Drain] = []

    @property
    def next_due(self) -> float:
        """When the first caller has waited long enough; infinity if none ever has."""
        return min((drain.due for drain in self._drains), default=math.inf)

    def wait(
        self,
        records: list[AdapterRecord],
        timeout_seconds: float | None,
        reply: Callable[[AdapterInfo | GraftError], None],
    ) -> None:
        """Reply when all of these are freed, or with DeadlineExceeded when the time is over."""
        due = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._drains.append(_Drain(set(records), reply, due))

    def freed(self, record: AdapterRecord, info: AdapterInfo) -> None:
        """A generation is gone; `info` tells what it gave back."""
        for drain in [drain for drain in self._drains if record in drain.records]:
            drain.records.remove(record)
            drain.freed_host_bytes += info.freed_host_bytes
            drain.freed_device_bytes += info.freed_device_bytes
            drain.told = info if not info.derived else drain.told
            if not drain.records:
                self._drains.remove(drain)
                told = replace(
                    drain.told or info,
                    freed_host_bytes=drain.freed_host_bytes,
                    freed_device_bytes=drain.freed_device_bytes,
                )
                drain.reply(told)

    def end_overdue(self, now: float) -> None:
        """Tell those whose time is over how many requests still run; the draining goes on."""
        for drain in [drain for drain in self._drains if drain.due <= now]:
            self._drains.remove(drain)
            running = ", ".join(f"{record.references} of {record.label}" for record in drain.records)
            message = f"requests still run: {running}; they may end, and new ones are not taken"
            drain.reply(DeadlineExceeded(message, reason="ADAPTER_DRAINING"))
