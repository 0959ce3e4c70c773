"""`graft serve`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime import demo
from runtime.adapters.expression import ADAPTER_ID
from runtime.config import EngineConfig, ServerConfig
from runtime.server import event_loop
from runtime.server.server import Addresses, serve

READY = "ready: "


def run(options: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    if options.model is None:
        _say(f"no MODEL given: serving the bundled demo model {demo.MODEL_DIR}")
    return event_loop.run(serve(build_config(options), on_ready=_say_ready))


def build_config(options: argparse.Namespace) -> ServerConfig:
    """The configuration that the arguments describe; raises ValueError."""
    engine = EngineConfig(
        model_path=(options.model or demo.MODEL_DIR).expanduser(),
        device=options.device,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_tokens=options.kv_cache_tokens,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_size=options.max_batch_size,
        max_waiting_requests=options.max_waiting_requests,
        adapter_memory_gib=options.adapter_memory_gib,
        replacement_experts=options.replacement_experts,
        max_adapters=options.max_adapters,
        adapter_host_memory_gib=options.adapter_host_memory_gib,
        adapter_cycle_seconds=options.adapter_cycle_seconds,
        max_adapter_wait_seconds=options.max_adapter_wait_seconds,
        reading_process=True,
    )
    config = ServerConfig(
        engine=engine,
        host=options.host,
        grpc_port=options.grpc_port,
        admin_port=options.admin_port,
        http_port=options.http_port,
        adapters_root=options.adapters_root,
        adapters_on_demand=options.adapters_on_demand,
        adapters_manifest=options.adapters_manifest,
        adapters=_adapters(options.adapter),
        max_new_tokens_limit=options.max_new_tokens,
        default_max_new_tokens=options.default_max_new_tokens,
        drain_delay_seconds=options.drain_delay,
        drain_timeout_seconds=options.drain_timeout,
        stall_seconds=options.stall_seconds,
        max_connection_age_seconds=options.max_connection_age,
        metrics_max_adapters=options.metrics_max_adapters,
        slow_reader_seconds=options.slow_reader_seconds,
        max_adapter_requests=options.max_adapter_requests,
        max_adapter_tokens=options.max_adapter_tokens,
    )
    config.validate()
    return config


def _adapters(pairs: list[tuple[str, Path]]) -> dict[str, Path]:
    for name, path in pairs:
        if not ADAPTER_ID.fullmatch(name):
            raise ValueError(f"--adapter: the name {name!r} must match {ADAPTER_ID.pattern}")
        if not path.is_dir():
            raise ValueError(f"--adapter {name}: there is no folder {path}")
    if len(dict(pairs)) < len(pairs):
        raise ValueError("--adapter: a name is given twice")
    return dict(pairs)


def _say_ready(addresses: Addresses) -> None:
    _say(f"{READY}{addresses}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
