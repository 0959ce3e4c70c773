"""The engine as it is, with a clock: when each step ended, how long it took, and how much of it was for adapters.

`python -m benchmarks.timed_engine FILE SERVE_ARGUMENTS...` is `graft serve` with this engine. FILE is written when it
ends: lines of JSON, [monotonic seconds at the end, seconds, seconds of them for adapters, tokens], only of steps that
ran a batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.cli import build_parser
from runtime.commands.serve import build_config
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.messages import Event, StepOutputs
from runtime.env import configure_logging
from runtime.server import event_loop
from runtime.server.server import Addresses, serve

STEPS_FILE = "BENCHMARK_STEPS_FILE"


class TimedEngine(Engine):
    """Records every step that gave tokens."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__(config, progress)
        self._steps: list[tuple[float, float, float, int]] = []
        self._adapter_seconds = 0.0
        self._plain_advance = self.adapters.advance
        self.adapters.advance = self._timed_advance  # type: ignore[method-assign]

    def step(self) -> list[Event]:
        """One step, timed."""
        started, self._adapter_seconds = time.monotonic(), 0.0
        events = super().step()
        ended = time.monotonic()
        num_tokens = sum(len(event.outputs) for event in events if isinstance(event, StepOutputs))
        if num_tokens:
            self._steps.append((ended, ended - started, self._adapter_seconds, num_tokens))
        return events

    def close(self) -> None:
        """Write the record, then end."""
        text = "".join(json.dumps(step) + "\n" for step in self._steps)
        Path(os.environ[STEPS_FILE]).write_text(text, encoding="utf-8")
        super().close()

    def _timed_advance(self, *, whole: bool) -> None:
        started = time.monotonic()
        self._plain_advance(whole=whole)
        self._adapter_seconds += time.monotonic() - started


def main(steps_file: str, arguments: Sequence[str]) -> int:
    """Serve until SIGTERM."""
    configure_logging()
    os.environ[STEPS_FILE] = steps_file
    config = build_config(build_parser().parse_args(["serve", *arguments]))
    serving = serve(config, on_ready=_say_ready, engine_class="benchmarks.timed_engine:TimedEngine")
    return event_loop.run(serving)


def _say_ready(addresses: Addresses) -> None:
    print(f"ready: {addresses}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
