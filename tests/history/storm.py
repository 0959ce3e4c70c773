"""A storm: many clients and some operators against one live server, and the history of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.marked_model import write_base
from runtime.env import child_environment
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub
from tests.history.clients import Client
from tests.history.operators import Operator, watch
from tests.history.plan import ALIASES, BROKEN, COMPOSED, LOADED, ON_DEMAND, Folders, Plan
from tests.history.records import History
from tests.server.live import LiveServer

MAX_ADAPTERS = 4
MAX_ADAPTER_WAIT_SECONDS = 20.0
# Beyond the wait for a place: for a file, for a seat in the batch, and for the machine's other work.
OTHER_WAIT_SECONDS = 20.0
NUM_CHANNELS = 4
FLAGS = (
    *("--grpc-port", "0", "--admin-port", "0", "--http-port", "0", "--drain-delay", "0", "--dtype", "float32"),
    *("--max-adapters", str(MAX_ADAPTERS), "--adapter-memory-gib", "0.004", "--adapter-host-memory-gib", "0.005"),
    *("--adapter-cycle-seconds", "0.05", "--max-adapter-wait-seconds", str(MAX_ADAPTER_WAIT_SECONDS)),
    *("--max-model-len", "64", "--adapters-on-demand"),
)


def storm_server(folder: Path, engine: str = "whole", root: Path | None = None) -> LiveServer:
    """`graft serve` with the marked base, `folder`/adapters or another root, and an engine of `broken`."""
    base, root = folder / "base", root or folder / "adapters"
    if not base.exists():
        write_base(base)
    root.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.history.serve_storm", engine, "serve", str(base)]
    return LiveServer([*command, "--adapters-root", str(root), *FLAGS], child_environment())


@dataclass(frozen=True)
class Left:
    """What the server still held when all clients had gone and everything was unloaded."""

    adapters: list[str]
    slots: int
    device_bytes: int
    host_bytes: int


async def run_storm(server: LiveServer, root: Path, plan: Plan) -> tuple[History, Left]:
    """Everything at once until the requests are spent."""
    folders, generations = Folders(root), dict[str, int]()
    history = History(
        on_demand=folders.prepare(),
        broken={BROKEN},
        max_adapter_wait_seconds=MAX_ADAPTER_WAIT_SECONDS,
        max_wait_seconds=MAX_ADAPTER_WAIT_SECONDS + OTHER_WAIT_SECONDS,
    )
    async with grpc.aio.insecure_channel(server.admin_address) as admin:
        watching = asyncio.create_task(watch(admin, history))
        names = [*LOADED, *ON_DEMAND, COMPOSED, *ALIASES]
        operators = [
            Operator(admin, random.Random(f"{plan.seed} operator {index}"), names[index :: plan.num_operators], history,
                     folders, generations)
            for index in range(plan.num_operators)
        ]  # fmt: skip
        await asyncio.gather(*(operator.load_all() for operator in operators))
        stopping = asyncio.Event()
        operating = [
            asyncio.create_task(_operate(operator, plan, index, stopping)) for index, operator in enumerate(operators)
        ]
        sending = asyncio.create_task(_send_all(server, plan, history, generations))
        await asyncio.wait([sending, watching, *operating], return_when=asyncio.FIRST_COMPLETED)
        stopping.set()
        await asyncio.gather(sending, *operating)
        left = await _unload_everything(AdapterServiceStub(admin))
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    return history, left


async def _operate(operator: Operator, plan: Plan, index: int, stopping: asyncio.Event) -> None:
    draw = random.Random(f"{plan.seed} pause {index}")
    while not stopping.is_set():
        await operator.act()
        await asyncio.sleep(draw.uniform(*plan.operator_pause_seconds))


async def _send_all(server: LiveServer, plan: Plan, history: History, generations: dict[str, int]) -> None:
    """`num_clients` at a time; a client sends its next request when the last one has ended."""
    remaining = iter(range(plan.num_requests))
    channels = [
        grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(NUM_CHANNELS)
    ]

    async def run(index: int) -> None:
        draw = random.Random(f"{plan.seed} client {index}")
        client = Client(channels[index % NUM_CHANNELS], draw, generations)
        for _ in remaining:
            history.requests += await client.send()

    try:
        await asyncio.gather(*(run(index) for index in range(plan.num_clients)))
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _unload_everything(stub: AdapterServiceStub) -> Left:
    """Nothing may be held in the end; sums go with their parts."""
    deadline = time.monotonic() + 30.0
    while True:
        listed = await stub.ListAdapters(pb.ListAdaptersRequest(page_size=1000))
        for adapter in listed.adapters:
            if not adapter.derived:
                await stub.UnloadAdapter(pb.UnloadAdapterRequest(name=adapter.name, allow_missing=True))
        if not listed.adapters or time.monotonic() > deadline:
            names = [f"{item.name}@{item.generation}" for item in listed.adapters]
            return Left(names, listed.slots_used, listed.bytes_used, listed.bytes_host_used)
