"""One generation of one adapter, as the engine loop knows it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from decimal import Decimal

from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.info import AdapterInfo, AdapterState, LayerCoverage, PartInfo
from runtime.errors import GraftError


@dataclass(frozen=True)
class AdapterFacts:
    """What was found in its files; `device_bytes` is what its pages take in either tier."""

    lora_rank_max: int = 0
    num_expert_pages: int = 0
    target_modules: list[str] = field(default_factory=list)
    tensor_bytes: int = 0
    device_bytes: int = 0
    layers: list[LayerCoverage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A generation in a weighted sum."""

    weight: Decimal
    record: AdapterRecord


@dataclass(frozen=True)
class Source:
    """What a generation is made of, as plain data that no step changes: files, or a weighted sum.

    `host` are its pages if they are in memory; then nothing needs to be read. `digest` may be unknown before that ("").
    """

    label: str
    path: str
    digest: str
    facts: AdapterFacts
    host: HostAdapter | None = None
    parts: tuple[tuple[Decimal, Source], ...] = ()


@dataclass(eq=False)
class AdapterRecord:
    """Owned by the engine loop. `references` counts requests that hold it, `num_running` those with a place in a batch.

    It may run when `is_resident`: all its pages are on the device, under `slot`; `has_run` once a sequence of it has
    begun since then; `seated_since` (monotonic) is when it got the slot. While it `is_yielding`, others wait for its
    slot and no sequence of it begins. `host` are its pages in host memory, if they are there. `digest` is that of the
    bytes that were read, or must be read. After a failure `error` is told to requests until `retry_at` (monotonic).

    A sum of other generations has `parts` and no path. It is `derived` if it was made because requests named the sum:
    then it lives no longer than its parts, while one that an operator has named is a snapshot of its own.
    """

    name: str
    generation: int
    path: str
    digest: str = ""
    state: AdapterState = AdapterState.LOADING
    pinned: bool = False
    slot: int = -1
    is_resident: bool = False
    is_yielding: bool = False
    has_run: bool = False
    resident_since: float = 0.0
    seated_since: float = 0.0
    host: HostAdapter | None = None
    references: int = 0
    num_running: int = 0
    facts: AdapterFacts = AdapterFacts()
    created: float = field(default_factory=time.time)
    load_seconds: float = 0.0
    last_used: float = 0.0
    error: GraftError | None = None
    retry_at: float = 0.0
    parts: tuple[Part, ...] = ()
    derived: bool = False

    @property
    def label(self) -> str:
        """NAME@GENERATION, or the sum of such."""
        return self.name if self.derived else f"{self.name}@{self.generation}"

    def source(self) -> Source:
        """What it is made of now."""
        parts = tuple((part.weight, part.record.source()) for part in self.parts)
        return Source(self.label, self.path, self.digest, self.facts, self.host, parts)

    @property
    def age(self) -> tuple[float, int]:
        """Who was used less recently is smaller; until its first use its load counts as one."""
        return max(self.created, self.last_used), self.generation

    @property
    def host_bytes(self) -> int:
        """Bytes that it takes in host memory now."""
        return self.host.num_bytes if self.host is not None else 0

    @property
    def device_bytes(self) -> int:
        """Bytes that it takes on the device, or is about to: 0 without a slot."""
        return self.facts.device_bytes if self.slot >= 0 else 0

    def info(
        self, *, already_loaded: bool = False, freed_host_bytes: int = 0, freed_device_bytes: int = 0
    ) -> AdapterInfo:
        """A snapshot for the outside."""
        return AdapterInfo(
            name=self.name,
            generation=self.generation,
            digest=self.digest,
            state=self.state,
            lora_rank_max=self.facts.lora_rank_max,
            num_expert_pages=self.facts.num_expert_pages,
            target_modules=self.facts.target_modules,
            num_running=self.references,
            host_bytes=self.host_bytes,
            device_bytes=self.device_bytes,
            tensor_bytes=self.facts.tensor_bytes,
            slot=self.slot if self.is_resident else -1,
            load_seconds=self.load_seconds,
            last_used=self.last_used,
            created=self.created,
            source_path=self.path,
            already_loaded=already_loaded,
            pinned=self.pinned,
            layers=self.facts.layers,
            freed_host_bytes=freed_host_bytes,
            freed_device_bytes=freed_device_bytes,
            error=self.error.message if self.error is not None else "",
            warnings=self.facts.warnings,
            parts=[PartInfo(part.record.name, part.record.generation, float(part.weight)) for part in self.parts],
            derived=self.derived,
        )
