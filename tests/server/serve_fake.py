"""A real server process with the fake engine behind it: `serve_fake.py MODEL ADAPTERS_ROOT [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from runtime.config import EngineConfig, ServerConfig
from runtime.env import configure_logging
from runtime.server import event_loop
from runtime.server.server import serve


def main(model: str, adapters_root: str, *settings: str) -> int:
    """Prints `ready: ...` as `graft serve` does."""
    pairs = [setting.split("=") for setting in settings]
    values = {key: float(value) if "." in value else int(value) for key, value in pairs}
    in_engine = {key: value for key, value in values.items() if hasattr(EngineConfig, key)}
    in_server = {key: value for key, value in values.items() if key not in in_engine}
    config = ServerConfig(
        EngineConfig(Path(model)),
        grpc_port=0,
        admin_port=0,
        http_port=0,
        adapters_root=Path(adapters_root),
        drain_delay_seconds=0.0,
    )
    config = replace(config, engine=replace(config.engine, **in_engine), **in_server)
    configure_logging()
    engine_class = "tests.server.fake_engine:FakeEngine"
    return event_loop.run(serve(config, on_ready=lambda a: print(f"ready: {a}", flush=True), engine_class=engine_class))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
