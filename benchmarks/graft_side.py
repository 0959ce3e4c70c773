"""Graft's part of decode_vs_peft: the engine in process, all requests at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.make_model import NUM_ADAPTERS, adapter_dir, base_dir
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.messages import (
    AdapterReply,
    AddRequest,
    CallFailed,
    CallId,
    LoadAdapter,
    RequestFailed,
    RequestId,
    StepOutputs,
)
from runtime.engine.sampling_params import SamplingParams

Prompts = Sequence[list[int]]


@dataclass
class Run:
    """One timed run: wall seconds from the first submit to the last token, and the tokens of each request."""

    seconds: float
    tokens: list[list[int]]


@dataclass
class GraftResult:
    """Timed runs with one adapter per request and without any, taken in turn, and what loading took."""

    with_adapters: list[Run] = field(default_factory=list)
    base_only: list[Run] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)


def measure(out: Path, prompts: Prompts, num_new_tokens: int, repeats: int) -> GraftResult:
    """Load everything, warm both paths up, then time them alternately so that both see the same machine."""
    result = GraftResult()
    names = [f"adapter-{index}" for index in range(NUM_ADAPTERS)]
    with _engine(out, prompts, num_new_tokens) as engine:
        for index, name in enumerate(names):
            result.load_seconds.append(_load(engine, name, adapter_dir(out, index, "per-expert")))
        _generate(engine, prompts, names, 2)
        _generate(engine, prompts, [None] * len(prompts), 2)
        for _ in range(repeats):
            result.with_adapters.append(_generate(engine, prompts, names, num_new_tokens))
            result.base_only.append(_generate(engine, prompts, [None] * len(prompts), num_new_tokens))
    return result


@contextmanager
def _engine(out: Path, prompts: Prompts, num_new_tokens: int) -> Iterator[Engine]:
    max_model_len = 16 + num_new_tokens + max(map(len, prompts))
    config = EngineConfig(
        base_dir(out), max_model_len=max_model_len, kv_cache_tokens=len(prompts) * max_model_len, adapter_memory_gib=2.0
    )
    with closing(Engine(config)) as engine:
        yield engine


def _load(engine: Engine, name: str, path: Path) -> float:
    begin = time.perf_counter()
    engine.submit(LoadAdapter(CallId(0), name, str(path.resolve())))
    while True:
        engine.wait_for_work(0.1)
        for event in engine.step():
            if isinstance(event, AdapterReply):
                return time.perf_counter() - begin
            if isinstance(event, CallFailed):
                raise RuntimeError(f"{name}: {event.message} {event.problems}")


def _generate(engine: Engine, prompts: Prompts, adapters: Sequence[str | None], num_new_tokens: int) -> Run:
    params = SamplingParams(max_new_tokens=num_new_tokens, min_new_tokens=num_new_tokens)
    tokens: list[list[int]] = [[] for _ in prompts]
    open_requests = len(prompts)
    begin = time.perf_counter()
    for index, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        engine.submit(AddRequest(RequestId(index), prompt, params, adapter))
    while open_requests:
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise RuntimeError(event.message)
            if isinstance(event, StepOutputs):
                for output in event.outputs:
                    tokens[output.request_id].append(output.token_id)
                    open_requests -= output.finish_reason is not None
    return Run(time.perf_counter() - begin, tokens)
