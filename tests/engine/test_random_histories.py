"""Whatever is added, cancelled, paused, loaded and unloaded in whatever order: in the end nothing is held."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.messages import (
    AdapterReply,
    AddRequest,
    CallFailed,
    CallId,
    CancelRequest,
    Event,
    FinishReason,
    LoadAdapter,
    PauseRequest,
    PinAdapter,
    PromptScored,
    RequestFailed,
    RequestId,
    SequenceOutput,
    StepOutputs,
    UnloadAdapter,
)
from runtime.engine.sampling_params import SamplingParams
from tests.conftest import RecordNumber
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V3, Shape

CONFIG = {"max_model_len": 96, "kv_cache_tokens": 112, "kv_block_tokens": 16, "max_batch_tokens": 24,
          "max_batch_size": 4, "max_waiting_requests": 10, "max_adapters": 2}  # fmt: skip
RECIPES = {
    "experts": AdapterRecipe(("routed_experts",), lora_rank=4, seed=1),
    "attention": AdapterRecipe(("q_b_proj", "o_proj", "lm_head"), lora_rank=8, seed=2),
}
BROKEN = "broken"
NUM_CANCELLED = 1000
DRAIN_SECONDS = 60.0
# Without shrinking, which would take minutes: add Phase.shrink to look into a failure.
PROFILE = settings(max_examples=45, stateful_step_count=60, derandomize=True, deadline=None, database=None,
                   phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip

# What must have happened at least once, or the histories say little.
COUNTED = ("steps", "preemptions", "paused sequences in a step", "AdapterReply", "CallFailed", "cancels",
           FinishReason.EOS, FinishReason.MAX_NEW_TOKENS, FinishReason.DEADLINE, "ADAPTER_NOT_FOUND",
           "QUEUE_FULL", "ADAPTER_UNLOADED", "ADAPTER_DRAINING")  # fmt: skip

names = st.sampled_from([*RECIPES, BROKEN])
wanted = st.sampled_from([None, None, "experts", *RECIPES, BROKEN])
deadlines = st.sampled_from([None, None, None, None, None, None, 1000.0, 0.02, -1.0])
few = st.integers(0, 4)
params = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(20, 60),
    min_new_tokens=st.sampled_from([0, 20, 20]),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    top_k=st.sampled_from([0, 10]),
    top_p=st.sampled_from([1.0, 0.9]),
    typical_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 3),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    length_penalty_factor=st.sampled_from([1.0, 1.5]),
    logprobs=st.booleans(),
    num_top_tokens=st.sampled_from([0, 2]),
    score_prompt=st.booleans(),
)


@dataclass
class Told:
    """What one request asked and what the engine said to it."""

    request: AddRequest
    num_tokens: int = 0
    num_scores: int = 0
    end: str = ""
    cancelled: bool = False


class EngineHistory(RuleBasedStateMachine):
    """Drives one engine; the events of each request are checked as they come."""

    def __init__(self, base: Path, adapters: dict[str, Path], seen: Counter[str]) -> None:
        super().__init__()
        self.engine = Engine(EngineConfig(base, dtype="float32", **CONFIG))  # type: ignore[arg-type]
        self.adapters = adapters
        self.seen = seen
        self.told: dict[int, Told] = {}
        self.open_calls: set[int] = set()
        self.num_calls = 0

    @initialize()
    def load_one(self) -> None:
        self.load("experts")

    @rule(length=st.integers(1, 90), params=params, adapter=wanted, count=st.integers(1, 4), seconds=deadlines,
          steps=few)  # fmt: skip
    def add(
        self, length: int, params: SamplingParams, adapter: str | None, count: int, seconds: float | None, steps: int
    ) -> None:
        for index in range(count):
            deadline = None if seconds is None else time.time() + seconds
            prompt = [2 + index + length] * max(1, length // (index + 1))
            request = AddRequest(RequestId(len(self.told) + 1), prompt, params, adapter, deadline)
            self.told[request.request_id] = Told(request)
            self.engine.submit(request)
        self.step(steps)

    @rule(index=st.integers(-1, 12))
    def cancel(self, index: int) -> None:
        request_id = self._living(index)
        if request_id in self.told:
            self.told[request_id].cancelled = True
        self.engine.submit(CancelRequest(request_id))

    @rule(index=st.integers(-1, 12), paused=st.sampled_from([True, True, False]), steps=few)
    def pause(self, index: int, paused: bool, steps: int) -> None:
        self.engine.submit(PauseRequest(self._living(index), paused))
        self.step(steps)

    @rule(index=st.integers(0, 5), steps=few)
    def pause_one_that_runs(self, index: int, steps: int) -> None:
        """Few histories happen to name one."""
        running = self.engine.scheduler.running
        if running:
            self.engine.submit(PauseRequest(running[index % len(running)].request_id, paused=True))
            self.step(steps)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            if not self.engine.scheduler.can_run():
                self.engine.wait_for_work(0.002)  # or histories are over before a file is read, and little ever runs
            self._step()

    @rule(name=names)
    def load(self, name: str) -> None:
        self._call(LoadAdapter(self._next_call(), name, str(self.adapters[name])))

    @rule(name=names, files=names, pinned=st.booleans(), lazy=st.booleans())
    def replace(self, name: str, files: str, pinned: bool, lazy: bool) -> None:
        path = str(self.adapters[files])
        lazy = lazy and files != BROKEN  # or the name is dead for seconds
        self._call(LoadAdapter(self._next_call(), name, path, replace=True, pinned=pinned and not lazy, lazy=lazy))

    @rule(name=st.sampled_from([*RECIPES]), params=params, force=st.booleans())
    def unload_in_use(self, name: str, params: SamplingParams, force: bool) -> None:
        self.load(name)
        self.add(5, params, name, 2, None, 1)
        self.step(8)
        self.add(5, params, name, 2, None, 1)
        self.unload(name, force, 0.0)

    @rule(name=names, force=st.booleans(), seconds=st.sampled_from([None, 0.0, 0.01]))
    def unload(self, name: str, force: bool, seconds: float | None) -> None:
        self._call(UnloadAdapter(self._next_call(), name, force=force, drain_seconds=seconds))

    @rule(name=names, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self._call(PinAdapter(self._next_call(), name, pinned))

    @invariant()
    def every_block_is_free_or_held_by_one_running_sequence(self) -> None:
        scheduler = self.engine.scheduler
        held = [block for sequence in scheduler.running for block in sequence.blocks]
        assert len(set(held)) == len(held) == scheduler.blocks.num_blocks - scheduler.blocks.num_free
        assert all(sequence.blocks for sequence in scheduler.running)
        assert not any(sequence.blocks for sequence in scheduler.waiting)

    def teardown(self) -> None:
        try:
            self._drain()
            self._unload_all()
            self._assert_nothing_is_held()
        finally:
            self.engine.close()

    def _living(self, index: int) -> RequestId:
        """One of the requests that have not ended, oldest first; for -1 one that does not exist."""
        living = [request_id for request_id, told in self.told.items() if not told.end]
        return RequestId(living[index % len(living)] if living and index >= 0 else len(self.told) + 1)

    def _next_call(self) -> CallId:
        self.num_calls += 1
        return CallId(self.num_calls)

    def _call(self, command: LoadAdapter | UnloadAdapter | PinAdapter) -> None:
        self.open_calls.add(command.call_id)
        self.engine.submit(command)

    def _step(self) -> None:
        cancelled = [told for told in self.told.values() if told.cancelled and not told.end]
        for event in self.engine.step():
            self._take(event)
        for told in cancelled:
            self.seen["cancels"] += not told.end
            told.end = told.end or "cancelled"
        self.seen["steps"] += 1
        self.seen["paused sequences in a step"] += sum(item.paused for item in self.engine.scheduler.running)

    def _take(self, event: Event) -> None:
        match event:
            case StepOutputs(outputs=outputs):
                for output in outputs:
                    self._take_output(output)
            case PromptScored(request_id, scores):
                told = self.told[request_id]
                assert not told.end and not told.cancelled
                assert told.num_tokens == 0 and told.request.params.score_prompt
                told.num_scores += len(scores)
            case RequestFailed(request_id, reason=reason):
                told = self.told[request_id]
                assert not told.end
                told.end = reason
                self.seen[reason] += 1
            case AdapterReply(call_id) | CallFailed(call_id):
                self.open_calls.remove(call_id)
                self.seen[type(event).__name__] += 1
                self.seen[event.reason if isinstance(event, CallFailed) else "done"] += 1

    def _take_output(self, output: SequenceOutput) -> None:
        told = self.told[output.request_id]
        params = told.request.params
        assert not told.end and not told.cancelled
        if output.token_id >= 0:
            told.num_tokens += 1
            asked = len(told.request.prompt_ids) - 1 if params.score_prompt else 0
            assert told.num_scores == asked
            assert (output.rank > 0) == params.logprobs
        if output.finish_reason is not None:
            told.end = output.finish_reason
            self.seen[output.finish_reason] += 1
            if output.finish_reason is FinishReason.MAX_NEW_TOKENS:
                assert told.num_tokens == params.max_new_tokens
            if output.finish_reason is FinishReason.EOS:
                assert told.num_tokens > params.min_new_tokens

    def _drain(self) -> None:
        """Let everything go on and end; the engine never waits for more than a file that is being read."""
        for request_id in self.told:
            self.engine.submit(PauseRequest(RequestId(request_id), paused=False))
        self._step()
        limit = time.monotonic() + DRAIN_SECONDS
        while self.open_calls or not all(told.end for told in self.told.values()):
            assert time.monotonic() < limit, "the engine does not get there"
            assert self.open_calls or self.engine.has_work(), "requests are left, but the engine sees no work"
            num_steps, must_run = self.engine.stats().steps, self._must_run()
            self._step()
            assert self.engine.stats().steps > num_steps or not must_run, "the engine spins"
            self.engine.wait_for_work(0.001)

    def _must_run(self) -> bool:
        """Whether the next step has to compute something, if no command comes: no deadline can come in between."""
        scheduler = self.engine.scheduler
        return scheduler.can_run() and all(sequence.deadline is None for sequence in scheduler.sequences())

    def _unload_all(self) -> None:
        assert all(info.num_running == 0 for info in self.engine.adapters.infos())
        for name in self.adapters:
            self._call(UnloadAdapter(self._next_call(), name, allow_missing=True))
        self._drain()

    def _assert_nothing_is_held(self) -> None:
        self._step()
        engine, stats = self.engine, self.engine.stats()
        self.seen["preemptions"] += stats.preemptions
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
        pages = engine.adapters.pages
        assert (pages.num_bytes, pages.vacant_bytes) == (0, 0) and engine.adapters.infos() == []
        gauges = (stats.running, stats.waiting, stats.kv_tokens_used, stats.adapters_resident)
        assert gauges == (0, 0, 0, 0)
        assert (stats.adapter_device_bytes, stats.adapter_host_bytes, stats.iteration_tokens) == (0, 0, 0)
        assert stats.estimated_wait_seconds == 0.0 and not engine.has_work()


@pytest.fixture(scope="module")
def base(oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(V3)


@pytest.fixture(scope="module")
def adapters(base: Oracle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    written = {name: write_adapter(base.path, folder / name, recipe).path for name, recipe in RECIPES.items()}
    (folder / BROKEN).mkdir()
    (folder / BROKEN / "adapter_config.json").write_text("{}")
    return written | {BROKEN: folder / BROKEN}


def test_random_histories_leave_nothing_behind(
    base: Oracle, adapters: dict[str, Path], record_number: RecordNumber
) -> None:
    seen: Counter[str] = Counter()
    run_state_machine_as_test(lambda: EngineHistory(base.path, adapters, seen), settings=PROFILE)
    for what in COUNTED:
        record_number(f"random histories: {what}", seen[what], at_least=1)


def test_a_thousand_requests_cancelled_at_once_leave_nothing_behind(
    base: Oracle, adapters: dict[str, Path], record_number: RecordNumber
) -> None:
    """Some run, some are paused, some wait for an adapter that is being read; then all are cancelled in one step."""
    config = EngineConfig(base.path, dtype="float32", max_model_len=96, max_waiting_requests=NUM_CANCELLED)
    engine = Engine(config)
    for index in range(NUM_CANCELLED):
        params = SamplingParams(50, 50, temperature=1.0, seed=index, repetition_penalty=1.1)
        deadline = time.time() + 1000 if index % 2 else None
        adapter = "attention" if index % 10 == 9 else None
        if index == 9:
            engine.submit(LoadAdapter(CallId(1), "attention", str(adapters["attention"])))
        engine.submit(AddRequest(RequestId(index), [5] * (1 + index % 40), params, adapter, deadline))
    started = time.perf_counter()
    engine.step()
    record_number("adding 1,000 requests and one step: ms", 1e3 * (time.perf_counter() - started), at_most=1000)
    for _ in range(3):
        engine.step()
    assert len(engine.scheduler.sequences()) == NUM_CANCELLED
    for index in range(0, NUM_CANCELLED, 3):
        engine.submit(PauseRequest(RequestId(index), paused=True))
    engine.step()
    for index in range(NUM_CANCELLED):
        engine.submit(CancelRequest(RequestId(index)))
    started = time.perf_counter()
    engine.step()
    record_number("cancelling 1,000 requests: ms", 1e3 * (time.perf_counter() - started), at_most=1000)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used, stats.estimated_wait_seconds) == (0, 0, 0, 0)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    engine.close()
    assert all(info.num_running == 0 for info in engine.adapters.infos())
