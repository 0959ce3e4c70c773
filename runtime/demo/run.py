"""`graft demo`: a live server, adapters hot-loaded through the admin API, 64 mixed requests at once, a table."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from runtime.commands.adapters import table
from runtime.commands.client import as_graft_error
from runtime.demo import ADAPTERS_DIR, MODEL_DIR
from runtime.demo.samples import Sample, read_tasks
from runtime.env import child_environment
from runtime.errors import GraftError
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub

NUM_REQUESTS = 64
BASE = "(base)"
READY = re.compile(r"ready: grpc (\S+), admin (\S+), http (\S+)")


@dataclass
class Score:
    """What the requests of one adapter, or of the base, came to."""

    num_bytes: int = 0
    num_requests: int = 0
    num_exact: int = 0
    num_tokens: int = 0

    def add(self, sample: Sample, response: pb.GenerationResponse) -> None:
        """Count one answer."""
        self.num_requests += 1
        self.num_exact += response.text.strip() == sample.completion.strip()
        self.num_tokens += response.generated_token_count


@dataclass
class Demo:
    """One run against one server."""

    generation: GenerationServiceStub
    admin: AdapterServiceStub
    tasks: dict[str, list[Sample]]
    scores: dict[str, Score] = field(default_factory=dict)

    async def load_adapters(self) -> None:
        """Hot-load every bundled adapter."""
        for name in self.tasks:
            request = admin_pb.LoadAdapterRequest(adapter_id=name, source_path=name)
            adapter = (await self.admin.LoadAdapter(request)).adapter
            seconds = adapter.load_time.ToMilliseconds() / 1000
            self.scores[name] = Score(num_bytes=adapter.bytes_device or adapter.bytes_tensors)
            print(f"  loaded {name}: generation {adapter.generation}, rank {adapter.rank}, {seconds:.2f} s")
        self.scores[BASE] = Score()

    async def stream_some(self) -> None:
        """One prompt for each adapter, printed as it comes."""
        print("streaming one answer of each:")
        for name, samples in self.tasks.items():
            sample = samples[-1]
            print(f"  [{name}] {' / '.join(sample.prompt.splitlines())} ", end="", flush=True)
            request = pb.SingleGenerationRequest(
                adapter_id=name, request=pb.GenerationRequest(text=sample.prompt), params=_parameters(sample)
            )
            async for response in self.generation.GenerateStream(request):
                print(response.text, end="", flush=True)
            print()

    async def send_all(self) -> float:
        """All requests at once, adapters and the base in turn; returns the seconds they took."""
        names = list(self.scores)
        start = time.monotonic()
        await asyncio.gather(*(self._send(names[i % len(names)], i // len(names)) for i in range(NUM_REQUESTS)))
        return time.monotonic() - start

    async def _send(self, name: str, index: int) -> None:
        samples = self.tasks.get(name) or [samples[index % len(samples)] for samples in self.tasks.values()]
        sample = samples[index % len(samples)]
        request = pb.BatchedGenerationRequest(
            adapter_id=None if name == BASE else name,
            requests=[pb.GenerationRequest(text=sample.prompt)],
            params=_parameters(sample),
        )
        response = await self.generation.Generate(request)
        self.scores[name].add(sample, response.responses[0])

    def print_table(self, seconds: float) -> None:
        """One row for each adapter and the base."""
        rows = [
            (
                name,
                str(score.num_requests),
                f"{100 * score.num_exact / max(1, score.num_requests):.0f}%",
                f"{score.num_tokens / seconds:.1f}",
                f"{score.num_bytes:,}",
            )
            for name, score in self.scores.items()
        ]
        print(*table(("ADAPTER", "REQUESTS", "EXACT MATCH", "TOKENS/S", "BYTES"), rows), sep="\n")
        num_tokens = sum(score.num_tokens for score in self.scores.values())
        print(f"{NUM_REQUESTS} requests, {num_tokens} tokens in {seconds:.1f} s: {num_tokens / seconds:.1f} tokens/s")


def run_demo() -> int:
    """Run it; the exit status is the server's."""
    return asyncio.run(_run(read_tasks()))


async def _run(tasks: dict[str, list[Sample]]) -> int:
    print(f"starting a server for {MODEL_DIR.name}, adapters root {ADAPTERS_DIR.name}/ ...", flush=True)
    async with _server() as (process, grpc_address, admin_address):
        async with grpc.aio.insecure_channel(grpc_address) as public, grpc.aio.insecure_channel(admin_address) as admin:
            demo = Demo(GenerationServiceStub(public), AdapterServiceStub(admin), tasks)
            try:
                await demo.load_adapters()
                await demo.stream_some()
                print(f"sending {NUM_REQUESTS} requests at once ...", flush=True)
                demo.print_table(await demo.send_all())
            except grpc.RpcError as error:
                raise as_graft_error(error, grpc_address) from error
        process.send_signal(signal.SIGTERM)
        status = await process.wait()
    print("the server drained and stopped cleanly" if status == 0 else f"the server exited with {status}")
    return status


@contextlib.asynccontextmanager
async def _server() -> AsyncIterator[tuple[asyncio.subprocess.Process, str, str]]:
    """`graft serve` as a child on free ports; gives the process and its two gRPC addresses."""
    command = (
        sys.executable,
        "-m",
        "runtime.cli",
        "serve",
        "--adapters-root",
        str(ADAPTERS_DIR),
        "--grpc-port",
        "0",
        "--admin-port",
        "0",
        "--http-port",
        "0",
        "--drain-delay",
        "0",
    )
    environment = {"GRAFT_LOG_LEVEL": "WARNING", **child_environment()}
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        yield process, *await _addresses(process)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _addresses(process: asyncio.subprocess.Process) -> tuple[str, str]:
    if process.stdout is None:
        raise GraftError("the server has no output", reason="DEMO")
    async for line in process.stdout:
        if match := READY.search(line.decode()):
            print(f"  {match.group(0)}")
            return match[1], match[2]
    raise GraftError("the server ended before it was ready", reason="DEMO")


def _parameters(sample: Sample) -> pb.Parameters:
    """Greedy."""
    return pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=sample.max_new_tokens))
