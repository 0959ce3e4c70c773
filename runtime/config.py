"""Settings of the engine and of the server: frozen, checked in one place, built by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

DEVICES = ("cpu", "cuda", "npu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
# The keys of loaders.adapter.WRITERS, here without importing torch.
ADAPTER_WRITERS = ("peft", "peft-0.18", "unsloth", "megatron-bridge")
DAY_SECONDS = 86_400
MIN_RECEIVE_BYTES = 1024
MAX_RECEIVE_BYTES = 2**30
MAX_WAITING_REQUESTS = 1_000_000
MAX_QUEUED_OUTPUTS = 4096  # they may become one message, of which clients take 4 MiB


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs. Zero means "choose from the model" for `max_model_len` and `kv_cache_tokens`.

    `max_adapters` slots and `adapter_memory_gib` bound what is on the device, `adapter_host_memory_gib` (0: twice as
    much) what is in host memory beside it. `replacement_experts` of each layer are set aside on the device, beside
    that memory, for ESFT adapters. While others wait for a slot, an adapter may keep its own for
    `adapter_cycle_seconds`; a request waits for one for `max_adapter_wait_seconds` at most. With `reading_process`,
    as servers have it, a process of its own reads adapters, else a thread of the engine's.
    """

    model_path: Path
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int = 0
    kv_cache_tokens: int = 0
    kv_block_tokens: int = 16
    max_batch_tokens: int = 512
    max_batch_size: int = 64
    max_waiting_requests: int = 1024
    adapter_memory_gib: float = 1.0
    replacement_experts: int = 0
    adapter_host_memory_gib: float = 0.0
    adapter_cycle_seconds: float = 2.0
    max_adapter_wait_seconds: float = 60.0
    max_adapters: int = 64
    max_lora_rank: int = 128
    guide_cache_entries: int = 64
    guide_compile_seconds: float = 2.0
    reading_process: bool = False

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and the allowed range."""
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.model_path.is_dir(), "model", str(self.model_path), "an existing directory")
        _require(self.max_model_len >= 0, "max_model_len", self.max_model_len, ">= 0 (0: the model's own)")
        _require(self.kv_cache_tokens >= 0, "kv_cache_tokens", self.kv_cache_tokens, ">= 0 (0: chosen)")
        _require(1 <= self.kv_block_tokens <= 1024, "kv_block_tokens", self.kv_block_tokens, "1..1024")
        _require(self.max_batch_tokens >= 1, "max_batch_tokens", self.max_batch_tokens, ">= 1")
        _require(
            1 <= self.max_batch_size <= self.max_batch_tokens,
            "max_batch_size",
            self.max_batch_size,
            f"1..max_batch_tokens ({self.max_batch_tokens})",
        )
        _require(
            1 <= self.max_waiting_requests <= MAX_WAITING_REQUESTS,
            "max_waiting_requests",
            self.max_waiting_requests,
            f"1..{MAX_WAITING_REQUESTS}",
        )
        _require(self.adapter_memory_gib > 0, "adapter_memory_gib", self.adapter_memory_gib, "> 0")
        _require(0 <= self.replacement_experts <= 10_000, "replacement_experts", self.replacement_experts, "0..10000")
        host = self.adapter_host_memory_gib
        _require(host >= 0, "adapter_host_memory_gib", host, ">= 0 (0: twice what adapters take on the device)")
        cycle, wait = self.adapter_cycle_seconds, self.max_adapter_wait_seconds
        _require(0 <= cycle <= DAY_SECONDS, "adapter_cycle_seconds", cycle, f"0..{DAY_SECONDS}")
        _require(0 < wait <= DAY_SECONDS, "max_adapter_wait_seconds", wait, f"above 0, at most {DAY_SECONDS}")
        _require(1 <= self.max_adapters <= 10_000, "max_adapters", self.max_adapters, "1..10000")
        _require(1 <= self.max_lora_rank <= 512, "max_lora_rank", self.max_lora_rank, "1..512")
        _require(1 <= self.guide_cache_entries <= 10_000, "guide_cache_entries", self.guide_cache_entries, "1..10000")
        _require(
            0.05 <= self.guide_compile_seconds <= 60, "guide_compile_seconds", self.guide_compile_seconds, "0.05..60"
        )


@dataclass(frozen=True)
class ServerConfig:
    """What the front-end process needs; ports may be 0 for any free one.

    A draining server goes on answering for `drain_delay_seconds` at least, so that load balancers see it before it is
    gone, and waits for running requests for `drain_timeout_seconds` at most. It calls its engine stalled when no step
    has finished for `stall_seconds` while requests run. With `adapters_on_demand` a request may name any folder right
    under `adapters_root`; `adapters_manifest` is a file that lists the adapters that are to be there.

    One adapter may have `max_adapter_requests` requests in the server, waiting or running, whose prompts and answers
    may come to `max_adapter_tokens` tokens together; 0 is no bound. The default is half of the requests that may wait
    by default, so that one adapter cannot take all places. For tokens there is none: a bound below the longest sequence
    would refuse good requests, and what is too much depends on the KV cache. Requests that name no adapter are bounded
    by `max_waiting_requests` alone.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    grpc_port: int = 8033
    admin_host: str = "127.0.0.1"
    admin_port: int = 8034
    http_port: int = 8035
    adapters_root: Path | None = None
    adapters_on_demand: bool = False
    adapters_manifest: Path | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    max_new_tokens_limit: int = 1024
    default_max_new_tokens: int = 20
    drain_delay_seconds: float = 5.0
    drain_timeout_seconds: float = 60.0
    stall_seconds: float = 120.0
    max_connection_age_seconds: float = 1800.0
    max_receive_bytes: int = 16 * 2**20
    max_queued_outputs: int = 256
    slow_reader_seconds: float = 30.0
    metrics_max_adapters: int = 64
    max_adapter_requests: int = EngineConfig.max_waiting_requests // 2
    max_adapter_tokens: int = 0

    @property
    def model_name(self) -> str:
        """What clients see as the name of the base: its folder's."""
        return self.engine.model_path.resolve().name

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and the allowed range."""
        self.engine.validate()
        for name in ("grpc_port", "admin_port", "http_port"):
            _require(0 <= getattr(self, name) <= 65535, name, getattr(self, name), "0..65535")
        if self.adapters_root is not None:
            _require(self.adapters_root.is_dir(), "adapters_root", str(self.adapters_root), "an existing directory")
        needs_root = self.adapters_on_demand or self.adapters_manifest is not None
        _require(not needs_root or self.adapters_root is not None, "adapters_root", self.adapters_root, "a directory")
        manifest = self.adapters_manifest
        _require(manifest is None or manifest.is_file(), "adapters_manifest", str(manifest), "an existing file")
        _require(
            1 <= self.default_max_new_tokens <= self.max_new_tokens_limit,
            "default_max_new_tokens",
            self.default_max_new_tokens,
            f"1..max_new_tokens_limit ({self.max_new_tokens_limit})",
        )
        _require(self.max_new_tokens_limit < 2**31, "max_new_tokens_limit", self.max_new_tokens_limit, "below 2^31")
        for name, low in (("drain_delay_seconds", 0), ("drain_timeout_seconds", 0), ("max_connection_age_seconds", 1)):
            value = getattr(self, name)
            _require(low <= value <= DAY_SECONDS, name, value, f"{low}..{DAY_SECONDS}")
        for name in ("stall_seconds", "slow_reader_seconds"):
            value = getattr(self, name)
            _require(0 < value <= DAY_SECONDS, name, value, f"above 0, at most {DAY_SECONDS}")
        queued = self.max_queued_outputs
        _require(1 <= queued <= MAX_QUEUED_OUTPUTS, "max_queued_outputs", queued, f"1..{MAX_QUEUED_OUTPUTS}")
        bytes_range = f"{MIN_RECEIVE_BYTES}..{MAX_RECEIVE_BYTES}"
        is_allowed = MIN_RECEIVE_BYTES <= self.max_receive_bytes <= MAX_RECEIVE_BYTES
        _require(is_allowed, "max_receive_bytes", self.max_receive_bytes, bytes_range)
        num_labels = self.metrics_max_adapters
        _require(0 <= num_labels <= 10_000, "metrics_max_adapters", num_labels, "0..10000")
        for name in ("max_adapter_requests", "max_adapter_tokens"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0 (0: no bound)")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r} is out of range: {allowed}")
