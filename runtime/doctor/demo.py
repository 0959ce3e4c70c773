"""The demo model with its adapters in an engine here: mixed batches, known answers, a hot load and unload."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from loaders.tokenizer import Tokenizer
from runtime.adapters.info import AdapterInfo
from runtime.config import EngineConfig
from runtime.demo import ADAPTERS_DIR, MODEL_DIR
from runtime.demo.samples import Sample, read_tasks
from runtime.doctor.finding import Finding
from runtime.doctor.run import FAILED, PASSED
from runtime.engine.engine import Engine
from runtime.engine.messages import (
    AdapterReply,
    AddRequest,
    CallFailed,
    CallId,
    Command,
    Event,
    LoadAdapter,
    RequestFailed,
    RequestId,
    StepOutputs,
    UnloadAdapter,
)
from runtime.engine.sampling_params import SamplingParams
from runtime.errors import Internal

DEMO, HOT_LOAD = "demo end to end", "hot load and unload"
SAMPLES_EACH, MAX_MODEL_LEN = 8, 1024
MIN_EXACT = 0.9
IDLE_SECONDS, WAIT_SECONDS = 0.05, 120.0


@dataclass
class DemoRun:
    """One engine; ids are counted up, and tokens of each request are gathered as they come."""

    engine: Engine
    tokenizer: Tokenizer
    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    running: set[RequestId] = field(default_factory=set)
    adapters: dict[CallId, AdapterInfo] = field(default_factory=dict)
    num_steps: int = 0
    _next_id: int = 0

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def add(self, sample: Sample, adapter: str | None) -> RequestId:
        """Submit a greedy request."""
        request_id = RequestId(self._new_id())
        params = SamplingParams(max_new_tokens=sample.max_new_tokens)
        self.engine.submit(AddRequest(request_id, self.tokenizer.encode(sample.prompt), params, adapter))
        self.tokens[request_id] = []
        self.running.add(request_id)
        return request_id

    def load(self, name: str) -> AdapterInfo:
        """Load a bundled adapter; requests go on meanwhile."""
        call = CallId(self._new_id())
        return self._call(LoadAdapter(call, name, str(ADAPTERS_DIR / name)), call)

    def unload(self, name: str) -> AdapterInfo:
        """Unload it again."""
        call = CallId(self._new_id())
        return self._call(UnloadAdapter(call, name), call)

    def finish(self) -> None:
        """Step until no request runs; raises if that takes too long."""
        for _ in self._steps():
            if not self.running:
                return

    def answer(self, request_id: RequestId) -> str:
        """The text of a finished request."""
        ends = self.tokenizer.eos_token_ids
        return str(self.tokenizer.decode([token for token in self.tokens[request_id] if token not in ends])).strip()

    def _call(self, command: Command, call: CallId) -> AdapterInfo:
        self.engine.submit(command)
        for _ in self._steps():
            if call in self.adapters:
                break
        return self.adapters[call]

    def _steps(self) -> Iterator[None]:
        """Steps, and what came of them; raises what a request or call failed with."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            self.engine.wait_for_work(IDLE_SECONDS)
            for event in self.engine.step():
                self._take(event)
            self.num_steps += 1
            yield
        raise Internal(f"the engine did not finish within {WAIT_SECONDS:.0f} s", reason="DOCTOR")

    def _take(self, event: Event) -> None:
        match event:
            case CallFailed() | RequestFailed():
                raise Internal(event.message, reason=event.reason)
            case AdapterReply():
                self.adapters[event.call_id] = event.adapters[0]
            case StepOutputs():
                for output in event.outputs:
                    if output.token_id >= 0:
                        self.tokens[output.request_id].append(output.token_id)
                    if output.finish_reason is not None:
                        self.running.discard(output.request_id)
            case _:
                pass


def check_demo(device: str, samples_each: int = SAMPLES_EACH) -> list[Finding]:
    """Both findings; raises what the engine raises."""
    start = time.perf_counter()
    engine = Engine(EngineConfig(MODEL_DIR, device=device, max_model_len=MAX_MODEL_LEN))
    try:
        run = DemoRun(engine, Tokenizer.from_dir(MODEL_DIR))
        start_seconds = time.perf_counter() - start
        tasks = read_tasks()
        for name in tasks:
            run.load(name)
        return [_answers(run, tasks, samples_each, start_seconds), _hot_load(run, tasks)]
    finally:
        engine.close()


def _answers(run: DemoRun, tasks: dict[str, list[Sample]], samples_each: int, start_seconds: float) -> Finding:
    """The same mixed batch twice: the first time warms up."""
    _, first_seconds = _mixed_batch(run, tasks, samples_each)
    steps_before = run.num_steps
    asked, seconds = _mixed_batch(run, tasks, samples_each)
    of_adapters = [adapter is not None for _, _, adapter in asked]
    are_exact = [run.answer(request) == sample.completion.strip() for request, sample, _ in asked]
    num_exact = sum(exact for exact, of_adapter in zip(are_exact, of_adapters, strict=True) if of_adapter)
    num_tokens = sum(len(run.tokens[request]) for request, _, _ in asked)
    blocks = run.engine.scheduler.blocks
    facts: dict[str, float | int | str] = {
        "requests": len(asked),
        "adapters": len(tasks),
        "dtype": run.engine.ready.dtype,
        "exact_answers": num_exact,
        "answers_with_adapter": sum(of_adapters),
        "exact_answers_of_base": sum(are_exact) - num_exact,
        "tokens": num_tokens,
        "steps": run.num_steps - steps_before,
        "tokens_per_second": round(num_tokens / seconds, 1),
        "seconds": round(seconds, 3),
        "first_time_seconds": round(first_seconds, 3),
        "engine_start_seconds": round(start_seconds, 3),
    }
    problems = []
    if num_exact < MIN_EXACT * sum(of_adapters):
        problems.append(f"{num_exact} of {sum(of_adapters)} answers are right, {MIN_EXACT:.0%} must be")
    if blocks.num_free != blocks.num_blocks:
        problems.append(f"{blocks.num_blocks - blocks.num_free} blocks of the KV cache were not freed")
    return Finding(DEMO, FAILED if problems else PASSED, facts, "; ".join(problems))


def _mixed_batch(
    run: DemoRun, tasks: dict[str, list[Sample]], samples_each: int
) -> tuple[list[tuple[RequestId, Sample, str | None]], float]:
    """Every adapter's first samples and as many of the base, adapters in turn, all at once; and the seconds."""
    names: list[str | None] = [*tasks, None]
    start = time.perf_counter()
    asked = []
    for index in range(samples_each):
        for name in names:
            sample = next(iter(tasks.values()))[index] if name is None else tasks[name][index]
            asked.append((run.add(sample, name), sample, name))
    run.finish()
    return asked, time.perf_counter() - start


def _hot_load(run: DemoRun, tasks: dict[str, list[Sample]]) -> Finding:
    """Unload one adapter, load it and ask it, all while a request of another one runs."""
    other, name = list(tasks)[:2]
    bytes_before = run.engine.adapters.pages.num_bytes
    longest = max(tasks[other], key=lambda sample: sample.max_new_tokens)
    run.add(longest, other)
    seconds = []
    start = time.perf_counter()
    run.unload(name)
    seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    info = run.load(name)
    seconds.append(time.perf_counter() - start)
    sample = tasks[name][0]
    start = time.perf_counter()
    request = run.add(sample, name)
    run.finish()
    seconds.append(time.perf_counter() - start)
    is_right = run.answer(request) == sample.completion.strip()
    bytes_after = run.engine.adapters.pages.num_bytes
    facts: dict[str, float | int | str] = {
        "adapter": name,
        "bytes": info.tensor_bytes,
        "unload_ms": round(seconds[0] * 1e3, 2),
        "load_ms": round(seconds[1] * 1e3, 2),
        "first_answer_ms": round(seconds[2] * 1e3, 2),
        "device_bytes_before": bytes_before,
        "device_bytes_after": bytes_after,
    }
    problems = [] if is_right else ["the adapter's answer after it was loaded anew is not the one before"]
    if bytes_before != bytes_after:
        problems.append("the device's pages do not take the bytes that they took before")
    return Finding(HOT_LOAD, FAILED if problems else PASSED, facts, "; ".join(problems))
