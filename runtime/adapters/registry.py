"""Names, generations, slots and references of adapters: who may be used, and what can be freed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.errors import AlreadyExists, Conflict, Exhausted, GraftError, NotFound

Reply = Callable[[AdapterInfo | GraftError], None]


@dataclass
class AdapterRecord:
    """One generation of one adapter; owned by the engine loop."""

    name: str
    generation: int
    path: str
    expected_digest: str = ""
    state: AdapterState = AdapterState.LOADING
    digest: str = ""
    slot: int = -1
    references: int = 0
    host: HostAdapter | None = None
    lora_rank_max: int = 0
    num_expert_pages: int = 0
    target_modules: list[str] = field(default_factory=list)
    tensor_bytes: int = 0
    device_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    load_seconds: float = 0.0
    last_used: float = 0.0
    load_replies: list[Reply] = field(default_factory=list)
    unload_replies: list[Reply] = field(default_factory=list)

    def info(self, *, already_loaded: bool = False) -> AdapterInfo:
        """A snapshot for the outside."""
        return AdapterInfo(
            name=self.name,
            generation=self.generation,
            digest=self.digest,
            state=self.state,
            lora_rank_max=self.lora_rank_max,
            num_expert_pages=self.num_expert_pages,
            target_modules=self.target_modules,
            num_running=self.references,
            host_bytes=self.host.num_bytes if self.host else 0,
            device_bytes=self.device_bytes,
            tensor_bytes=self.tensor_bytes,
            slot=self.slot,
            load_seconds=self.load_seconds,
            last_used=self.last_used,
            created=self.created,
            source_path=self.path,
            already_loaded=already_loaded,
            warnings=self.warnings,
        )


class AdapterRegistry:
    """The live record of each name. A generation is never used twice; slots are reused when freed."""

    def __init__(self, max_slots: int) -> None:
        self._records: dict[str, AdapterRecord] = {}
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._max_slots = max_slots
        self._last_generation = 0

    def create(self, name: str, path: str, expected_digest: str) -> AdapterRecord:
        """Begin a load: a LOADING record with its own generation and slot."""
        if name in self._records:
            raise Conflict(f"adapter {name!r} is {self._records[name].state}", reason="ADAPTER_BUSY")
        if not self._free_slots:
            raise Exhausted(
                f"{self._max_slots} of {self._max_slots} adapter slots are in use: unload one or raise --max-adapters",
                reason="ADAPTER_SLOTS_FULL",
            )
        self._last_generation += 1
        record = AdapterRecord(name, self._last_generation, path, expected_digest, slot=self._free_slots.pop())
        self._records[name] = record
        return record

    def find(self, name: str) -> AdapterRecord | None:
        """The record of a name, if there is one."""
        return self._records.get(name)

    def get(self, name: str) -> AdapterRecord:
        """The record of a name; raises NotFound."""
        record = self._records.get(name)
        if record is None:
            raise NotFound(f"adapter {name!r} is not loaded", reason="ADAPTER_NOT_FOUND")
        return record

    def acquire(self, name: str) -> AdapterRecord:
        """Take a reference for a request; a loading adapter may be waited for, a draining one not."""
        record = self.get(name)
        if record.state is AdapterState.DRAINING:
            raise NotFound(f"adapter {name!r} is being unloaded", reason="ADAPTER_NOT_FOUND")
        record.references += 1
        record.last_used = time.time()
        return record

    def release(self, record: AdapterRecord) -> None:
        """Give a reference back."""
        record.references -= 1

    def forget(self, record: AdapterRecord) -> None:
        """Drop a record whose device pages are free."""
        del self._records[record.name]
        self._free_slots.append(record.slot)
        record.slot = -1

    def check_same(self, record: AdapterRecord, digest: str) -> None:
        """Raise AlreadyExists if a ready name stands for other bytes."""
        if record.digest != digest:
            raise AlreadyExists(
                f"adapter {record.name!r} is loaded with digest {record.digest}, not {digest}: unload it first",
                reason="ADAPTER_EXISTS",
            )

    def records(self) -> list[AdapterRecord]:
        """All records by name."""
        return [self._records[name] for name in sorted(self._records)]
