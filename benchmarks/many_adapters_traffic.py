"""Traffic of many adapters, sent when it is due and not when the last answer came; each answer is checked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.marked_adapters import write_marked_adapter
from benchmarks.marked_model import NUM_STATES, expected_tokens, text_of, token_of, tokens_of
from benchmarks.served_process import ServedProcess
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub

SAMPLE_SECONDS = 0.5
NUM_CHANNELS = 4
MAX_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Traffic:
    """Requests arrive at `rate_per_second` (Poisson), for adapter k with a chance of 1 / (k + 1) ** `zipf`."""

    num_adapters: int
    rate_per_second: float
    warm_up_seconds: float
    seconds: float
    zipf: float = 1.0
    num_new_tokens: int = 12
    seed: int = 0


@dataclass
class Answers:
    """What became of the requests that were sent after the warm-up, and memory over that time, in bytes by process."""

    waits_seconds: list[float] = field(default_factory=list)
    num_right: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    adapters: set[int] = field(default_factory=set)
    memory: list[dict[str, int]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


def name_of(index: int) -> str:
    """The name and the folder of an adapter; its mark is its index."""
    return f"adapter-{index}"


def write_adapters(root: Path, count: int) -> None:
    """All folders."""
    for index in range(count):
        write_marked_adapter(root / name_of(index), 0, index)


async def run(server: ServedProcess, traffic: Traffic) -> Answers:
    """Register all, warm up, measure."""
    answers = Answers()
    await _register(server, traffic.num_adapters)
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server.address, options=options) for _ in range(NUM_CHANNELS)]
    stubs = [GenerationServiceStub(channel) for channel in channels]
    try:
        await _send(stubs, traffic, traffic.warm_up_seconds, Answers(), "warm-up")
        answers.before = await asyncio.to_thread(server.metrics)
        sampling = asyncio.create_task(_sample(server, answers))
        await _send(stubs, traffic, traffic.seconds, answers, "measured")
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        answers.after = await asyncio.to_thread(server.metrics)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    return answers


async def _register(server: ServedProcess, count: int) -> None:
    async with grpc.aio.insecure_channel(server.admin_address) as channel:
        stub = AdapterServiceStub(channel)
        for index in range(count):
            name = name_of(index)
            await stub.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id=name, source_path=name, lazy=True))


async def _send(
    stubs: Sequence[GenerationServiceStub], traffic: Traffic, seconds: float, answers: Answers, phase: str
) -> None:
    """Requests for so long, and the answers to all of them."""
    draw = random.Random(f"{traffic.seed} {phase}")
    indices = range(traffic.num_adapters)
    cumulative = list(itertools.accumulate(1 / (index + 1) ** traffic.zipf for index in indices))
    due = started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for stub in itertools.cycle(stubs):
            due += draw.expovariate(traffic.rate_per_second)
            if due > started + seconds:
                return
            await asyncio.sleep(due - time.monotonic())
            index = draw.choices(indices, cum_weights=cumulative)[0]
            prompt = [token_of(draw.randrange(NUM_STATES), 0) for _ in range(draw.randint(1, MAX_PROMPT_TOKENS))]
            group.create_task(_ask(stub, traffic, index, prompt, answers))


async def _ask(stub: GenerationServiceStub, traffic: Traffic, index: int, prompt: list[int], answers: Answers) -> None:
    sent, first = time.monotonic(), None
    answers.adapters.add(index)
    request = pb.SingleGenerationRequest(
        adapter_id=name_of(index),
        request=pb.GenerationRequest(text=text_of(prompt)),
        params=pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=traffic.num_new_tokens)),
    )
    tokens: list[int] = []
    try:
        async for response in stub.GenerateStream(request):
            if response.text:
                first = first or time.monotonic()
                tokens += tokens_of(response.text)
    except grpc.aio.AioRpcError as error:
        answers.errors[f"{error.code().name}: {(error.details() or '')[:100]}"] += 1
    answers.waits_seconds.append((first or time.monotonic()) - sent)
    expected = expected_tokens(prompt[-1], {0: index}, traffic.num_new_tokens)
    if tokens == expected:
        answers.num_right += 1
    elif tokens:
        answers.wrong.append(f"{name_of(index)} after {prompt[-1]}: {tokens} instead of {expected}")


async def _sample(server: ServedProcess, answers: Answers) -> None:
    """The memory of the server's processes, until cancelled."""
    while True:
        answers.memory.append(await asyncio.to_thread(server.resident_bytes))
        await asyncio.sleep(SAMPLE_SECONDS)
