"""What the outside is told about an adapter: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class AdapterState(StrEnum):
    """Where a generation is in its life; UNSPECIFIED is that of files which were only checked.

    REGISTERED: on disk, read when a request names it; LOADING: being read and checked or copied; READY: serves from
    memory of the host or of the device; DRAINING: no new requests; then UNLOADED. FAILED: could not be loaded.
    """

    UNSPECIFIED = "UNSPECIFIED"
    REGISTERED = "REGISTERED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


@dataclass(frozen=True)
class LayerCoverage:
    """How many routed experts of a layer an adapter changes."""

    layer: int
    num_experts: int


@dataclass(frozen=True)
class PartInfo:
    """One generation that a sum of adapters was made of."""

    name: str
    generation: int
    weight: float


@dataclass(frozen=True)
class AdapterInfo:
    """One generation of an adapter. Times are Unix seconds; `slot` is its device index or -1.

    `num_running` counts the requests that hold it; `host_bytes` and `device_bytes` are what it takes there now, and
    `freed_host_bytes` and `freed_device_bytes` what its unloading gave back. `error` says why its last load failed.
    `parts` are what it is the sum of, if it is one; a `derived` one was made for requests that name its parts, and its
    name holds their generations.
    """

    name: str
    generation: int
    digest: str
    state: str
    lora_rank_max: int = 0
    num_expert_pages: int = 0
    target_modules: list[str] = field(default_factory=list)
    num_running: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    tensor_bytes: int = 0
    slot: int = -1
    load_seconds: float = 0.0
    last_used: float = 0.0
    created: float = 0.0
    source_path: str = ""
    already_loaded: bool = False
    pinned: bool = False
    layers: list[LayerCoverage] = field(default_factory=list)
    freed_host_bytes: int = 0
    freed_device_bytes: int = 0
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    parts: list[PartInfo] = field(default_factory=list)
    derived: bool = False


@dataclass(frozen=True)
class AliasInfo:
    """A name that stands for an adapter's name; requests may use it instead."""

    alias: str
    adapter: str
