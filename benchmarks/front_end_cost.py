"""What the front-end itself costs: CPU time of its process per streamed token, beside a bare grpc.aio server's.

    python -m benchmarks.front_end_cost [--streams 32] [--connections 1] [--step-ms 20] [--windows 8] [--seconds 2]
    python -m benchmarks.front_end_cost --profile    # where the time goes, by module; profiling itself makes it slower

Both servers stream to the same client, which is this process, in alternating windows. Counted is user and system time
of all threads of the server's process, by its own clock. What else runs on the machine still shows, in caches and in
wake-ups, so the best window says most about the code.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from runtime.env import child_environment
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas import generation_pb2_grpc as pb_grpc

ASKED_US = 60.0
PROMPT = "The quick brown fox jumps over the lazy dog while the cat sat on the mats and slept. " * 2
WARM_UP_SECONDS = 0.5
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Load:
    """What the client asks of a server: streams, spread over connections, each with a token every so often."""

    num_streams: int = 32
    num_connections: int = 1
    step_seconds: float = 0.02


@dataclass(frozen=True)
class Cost:
    """Microseconds of CPU per token, one number for each window."""

    graft_us: list[float] = field(default_factory=list)
    bare_us: list[float] = field(default_factory=list)


class ServerProcess:
    """One server of `front_end_servers`, and how many of its tokens the client has seen."""

    def __init__(self, kind: str, step_seconds: float, *flags: str) -> None:
        command = [sys.executable, "-m", "benchmarks.front_end_servers", kind, str(step_seconds), *flags]
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=child_environment())
        self.num_tokens = 0
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line.startswith("ready: "):
            raise RuntimeError(f"the {kind} server did not start")
        self.address = line.removeprefix("ready: ").strip()

    def cpu_seconds(self) -> float:
        """User and system time of the process so far, all threads."""
        return time.clock_gettime(_cpu_clock(self.process.pid))

    def stop(self) -> None:
        """End it, by force if it does not listen."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    async def read_stream(self, channel: grpc.aio.Channel) -> None:
        """Read one stream until it is cancelled, counting its tokens."""
        stopping = pb.StoppingCriteria(max_new_tokens=10**6)
        params = pb.Parameters(stopping=stopping)
        request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=PROMPT), params=params)
        stub: Any = pb_grpc.GenerationServiceStub(channel)
        seen = 0
        async for response in stub.GenerateStream(request):
            self.num_tokens += max(0, response.generated_token_count - seen)
            seen = max(seen, response.generated_token_count)


def _cpu_clock(pid: int) -> int:
    """Linux's number of the CPU-time clock of another process, as clock_getcpuclockid makes it."""
    return (~pid << 3) | 2


@contextmanager
def running(kind: str, step_seconds: float, *flags: str) -> Iterator[ServerProcess]:
    """A server process that is ended at the end."""
    server = ServerProcess(kind, step_seconds, *flags)
    try:
        yield server
    finally:
        server.stop()


async def measure_window(server: ServerProcess, load: Load, seconds: float) -> float:
    """Microseconds of the server's CPU per token while all streams are read."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # or the channels would share one connection
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(server.address, options))
            for _ in range(load.num_connections)
        ]
        readers = [
            asyncio.create_task(server.read_stream(channels[n % len(channels)])) for n in range(load.num_streams)
        ]
        await asyncio.sleep(WARM_UP_SECONDS)
        tokens, cpu = server.num_tokens, server.cpu_seconds()
        await asyncio.sleep(seconds)
        cost = 1e6 * (server.cpu_seconds() - cpu) / (server.num_tokens - tokens)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return cost


async def measure(load: Load, num_windows: int, seconds: float) -> Cost:
    """Alternating windows of both servers."""
    cost = Cost()
    with running("graft", load.step_seconds) as graft, running("bare", load.step_seconds) as bare:
        for _ in range(num_windows):
            cost.graft_us.append(await measure_window(graft, load, seconds))
            cost.bare_us.append(await measure_window(bare, load, seconds))
    return cost


def main() -> None:
    """Command line: see the module's text."""
    arguments = _parse()
    load = Load(arguments.streams, arguments.connections, arguments.step_ms / 1000)
    if arguments.profile:
        with running("graft", load.step_seconds, "--profile") as server:
            asyncio.run(measure_window(server, load, arguments.windows * arguments.seconds))
        return
    cost = asyncio.run(measure(load, arguments.windows, arguments.seconds))
    print(f"{load.num_streams} streams over {load.num_connections} connections, a token every {arguments.step_ms:g} ms")
    print("us of CPU per token:      best  median")
    for name, values in (("graft's front-end", cost.graft_us), ("bare grpc.aio", cost.bare_us)):
        each = " ".join(f"{value:.0f}" for value in values)
        print(f"  {name:<20} {min(values):7.1f} {statistics.median(values):7.1f}   ({each})")
    own = min(cost.graft_us) - min(cost.bare_us)
    print(f"  our share of it      {own:7.1f}           asked <= {ASKED_US:g} in all")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one window")
    parser.add_argument("--profile", action="store_true", help="print the front-end's time by module instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
