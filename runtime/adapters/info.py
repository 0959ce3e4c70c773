"""What the outside is told about an adapter: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class AdapterState(StrEnum):
    """LOADING: being read and checked or copied; READY: serves; DRAINING: no new requests; then gone."""

    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter. Times are Unix seconds; `slot` is its device index or -1; `num_running` counts its requests."""

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
    warnings: list[str] = field(default_factory=list)
