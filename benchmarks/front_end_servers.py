"""The two servers that `front_end_cost` compares: `python -m benchmarks.front_end_servers graft|bare STEP_SECONDS`.

`graft` is the front-end as `graft serve` runs it, with the paced engine behind it. `bare` is grpc.aio and nothing else:
it streams the same messages at the same pace, made in its own process: the least that a Python server can cost.
"""

from __future__ import annotations

import asyncio
import cProfile
import itertools
import os
import pstats
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from benchmarks.paced_engine import STEP_SECONDS
from runtime import demo
from runtime.config import EngineConfig, ServerConfig
from runtime.env import configure_logging
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas import generation_pb2_grpc as pb_grpc
from runtime.server import event_loop
from runtime.server.server import serve

NO_LIMIT = 10**6
TEXTS = [" the", " cat", " sat", " on", " mats", ",", " and", " dog", "s", " slept", "."]


def main(kind: str, step_seconds: str, *flags: str) -> int:
    """Print `ready: ADDRESS` and serve until SIGTERM."""
    configure_logging()
    if kind == "bare":
        event_loop.run(_serve_bare(float(step_seconds)))
        return 0
    os.environ[STEP_SECONDS] = step_seconds
    engine = EngineConfig(demo.MODEL_DIR)
    config = ServerConfig(
        engine, grpc_port=0, admin_port=0, http_port=0, max_new_tokens_limit=NO_LIMIT, drain_delay_seconds=0.0
    )
    serving = serve(config, on_ready=lambda a: _say_ready(a.grpc), engine_class="benchmarks.paced_engine:PacedEngine")
    with _profile(on="--profile" in flags):
        return event_loop.run(serving)


def _say_ready(address: str) -> None:
    print(f"ready: {address}", flush=True)


@contextmanager
def _profile(on: bool) -> Iterator[None]:
    """Print the main thread's time by module, in per cent."""
    if not on:
        yield
        return
    profile = cProfile.Profile()
    with profile:
        yield
    by_module: Counter[str] = Counter()
    for (file, _, name), (_, _, own_seconds, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        by_module[name if file == "~" else "/".join(Path(file).parts[-2:])] += own_seconds
    total = by_module.total()
    for module, seconds in by_module.most_common(40):
        print(f"{100 * seconds / total:5.1f} %  {module}", file=sys.stderr)


class _Pacer:
    """Wakes everyone who waits, once a step."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._waiting: list[asyncio.Future[None]] = []

    async def run(self) -> None:
        due = time.monotonic()
        while True:
            due += self._step_seconds
            await asyncio.sleep(due - time.monotonic())
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future


class _BareService(pb_grpc.GenerationServiceServicer):
    def __init__(self, pacer: _Pacer) -> None:
        self._pacer = pacer

    async def GenerateStream(
        self, request: pb.SingleGenerationRequest, context: Any
    ) -> AsyncIterator[pb.GenerationResponse]:
        for count, text in enumerate(itertools.cycle(TEXTS), 1):
            await self._pacer.wait()
            yield pb.GenerationResponse(text=text, generated_token_count=count)


async def _serve_bare(step_seconds: float) -> None:
    pacer = _Pacer(step_seconds)
    server = grpc.aio.server()
    pb_grpc.add_GenerationServiceServicer_to_server(_BareService(pacer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _say_ready(f"127.0.0.1:{port}")
    await pacer.run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
