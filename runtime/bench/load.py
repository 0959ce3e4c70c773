"""Sends the requests, in one event loop over long-lived channels, and notes what comes back and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import cycle, islice

import grpc

from runtime.bench.record import RequestError, RequestRecord
from runtime.bench.workload import RequestSpec
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub


class LoadGenerator:
    """Every request becomes a record in `records`, in the order in which they were due."""

    def __init__(
        self, stubs: Sequence[GenerationServiceStub], timeout_seconds: float, max_running: int | None = None
    ) -> None:
        self.records: list[RequestRecord] = []
        self._stubs = cycle(stubs)
        self._timeout_seconds = timeout_seconds
        self._places: AbstractAsyncContextManager[None] = (
            asyncio.Semaphore(max_running) if max_running else nullcontext()
        )

    async def closed_loop(
        self, requests: Iterator[RequestSpec], concurrency: int, *, num_requests: int = 0, seconds: float = 0.0
    ) -> float:
        """Keep `concurrency` requests running until `num_requests` were sent or `seconds` are over.

        Returns the time of its start, when the last request has ended.
        """
        start = time.monotonic()
        remaining = islice(requests, num_requests) if num_requests else requests

        async def send_one_after_the_other() -> None:
            for request in remaining:
                now = time.monotonic()
                if seconds and now >= start + seconds:
                    return
                await self._send(request, now)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send_one_after_the_other())
        return start

    async def open_loop(
        self,
        requests: Iterator[RequestSpec],
        arrivals: Iterator[float],
        *,
        num_requests: int = 0,
        seconds: float = 0.0,
    ) -> float:
        """Send a request at each of `arrivals`, whatever became of those before it; ends as `closed_loop` does.

        A request is timed from its scheduled arrival even if it is sent later. Otherwise a server that falls behind
        would be spared the very waiting that it causes (coordinated omission).
        """
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for index, (offset, request) in enumerate(zip(arrivals, requests, strict=False)):
                if (num_requests and index >= num_requests) or (seconds and offset >= seconds):
                    break
                await asyncio.sleep(max(0.0, start + offset - time.monotonic()))
                group.create_task(self._send(request, start + offset))
        return start

    async def _send(self, request: RequestSpec, arrived: float) -> None:
        record = RequestRecord(request.adapter, arrived)
        self.records.append(record)
        async with self._places:
            record.sent = time.monotonic()
            try:
                call = next(self._stubs).GenerateStream(request.message, timeout=self._timeout_seconds)
                async for response in call:
                    record.take(response, time.monotonic())
            except grpc.aio.AioRpcError as error:
                record.finish(time.monotonic(), RequestError.from_call(error))
            else:
                record.finish(time.monotonic())
