"""One benchmark from start to end: ask the server for its limits, warm up, send the load, keep what was seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc

from runtime.bench.load import LoadGenerator
from runtime.bench.plan import BenchPlan
from runtime.bench.record import RequestRecord
from runtime.bench.server_metrics import Snapshot, read_snapshot
from runtime.bench.workload import WARMUP, Workload
from runtime.commands.client import as_graft_error
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub

CONNECT_SECONDS = 30.0
MAX_WARMUP_CONCURRENCY = 32


@dataclass(frozen=True)
class BenchRun:
    """Everything that was seen. `start` is on the records' clock; `client_cpu_seconds` is what sending the load took.

    Rates are taken over `window_seconds` from the start: the time that was asked for, or until the last request ended.
    """

    plan: BenchPlan
    info: pb.ModelInfoResponse
    started: datetime
    start: float
    window_seconds: float
    wall_seconds: float
    client_cpu_seconds: float
    records: list[RequestRecord]
    warmup_records: list[RequestRecord]
    snapshots: tuple[Snapshot, Snapshot] | None


async def run_bench(plan: BenchPlan) -> BenchRun:
    """Raises GraftError if the server cannot be reached, ValueError if the plan does not fit it."""
    plan.validate()
    async with _stubs(plan) as stubs:
        info = await _model_info(stubs[0], plan.server)
        workload = Workload(plan, info)
        warmup = LoadGenerator(stubs, plan.timeout_seconds)
        if plan.num_warmup:
            concurrency = min(plan.num_warmup, plan.concurrency or MAX_WARMUP_CONCURRENCY)
            await warmup.closed_loop(workload.requests(WARMUP), concurrency, num_requests=plan.num_warmup)
        before = await _snapshot(plan)
        started, wall, cpu = datetime.now(UTC), time.monotonic(), time.process_time()
        load, start = await _send_load(plan, workload, stubs)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        after = await _snapshot(plan)
    last_end = max((record.ended for record in load.records), default=start)
    return BenchRun(
        plan=plan,
        info=info,
        started=started,
        start=start,
        window_seconds=plan.seconds or last_end - start,
        wall_seconds=wall,
        client_cpu_seconds=cpu,
        records=load.records,
        warmup_records=warmup.records,
        snapshots=(before, after) if before is not None and after is not None else None,
    )


async def _send_load(
    plan: BenchPlan, workload: Workload, stubs: list[GenerationServiceStub]
) -> tuple[LoadGenerator, float]:
    num_requests = 0 if plan.seconds else plan.num_requests
    if plan.is_open_loop:
        load = LoadGenerator(stubs, plan.timeout_seconds, plan.concurrency)
        arrivals = workload.arrivals()
        return load, await load.open_loop(
            workload.requests(), arrivals, num_requests=num_requests, seconds=plan.seconds
        )
    load = LoadGenerator(stubs, plan.timeout_seconds)
    return load, await load.closed_loop(
        workload.requests(), plan.concurrency, num_requests=num_requests, seconds=plan.seconds
    )


@asynccontextmanager
async def _stubs(plan: BenchPlan) -> AsyncIterator[list[GenerationServiceStub]]:
    """One for each connection; without pools of their own the channels would share a single one."""
    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        yield [
            GenerationServiceStub(await stack.enter_async_context(grpc.aio.insecure_channel(plan.server, options)))
            for _ in range(plan.num_connections)
        ]


async def _model_info(stub: GenerationServiceStub, address: str) -> pb.ModelInfoResponse:
    try:
        info: pb.ModelInfoResponse = await stub.ModelInfo(pb.ModelInfoRequest(), timeout=CONNECT_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise as_graft_error(error, address) from error
    return info


async def _snapshot(plan: BenchPlan) -> Snapshot | None:
    if not plan.metrics_address:
        return None
    return await asyncio.to_thread(read_snapshot, plan.metrics_address)
