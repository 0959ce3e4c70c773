"""What the engine does with requests: ends, refusals, cancels and deadlines that leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.messages import (
    AddRequest,
    CancelRequest,
    Event,
    FinishReason,
    RequestFailed,
    RequestId,
    SequenceOutput,
    StepOutputs,
)
from runtime.engine.sampling_params import SamplingParams
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V3, Shape


@pytest.fixture(scope="module")
def engine(oracle: Callable[[Shape], Oracle]) -> Iterator[Engine]:
    config = EngineConfig(oracle(V3).path, dtype="float32", max_model_len=128, kv_cache_tokens=256,
                          max_batch_size=4, max_waiting_requests=6)  # fmt: skip
    built = Engine(config)
    yield built
    built.close()


def _run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work():
        events += engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    return events


def _outputs(events: list[Event], request_id: int) -> list[SequenceOutput]:
    steps = [event.outputs for event in events if isinstance(event, StepOutputs)]
    return [output for outputs in steps for output in outputs if output.request_id == request_id]


def _add(engine: Engine, request_id: int, prompt: list[int], *, new: int = 4, deadline: float | None = None,
         adapter: str | None = None, **params: float) -> None:  # fmt: skip
    sampling = SamplingParams(max_new_tokens=new, min_new_tokens=new, **params)  # type: ignore[arg-type]
    engine.submit(AddRequest(RequestId(request_id), prompt, sampling, adapter, deadline))


def test_the_stats_of_a_step_tell_how_many_tokens_it_computed(engine: Engine) -> None:
    _add(engine, 1, [5, 6, 7], new=4)
    _add(engine, 2, [5, 6, 7, 8, 9], new=2)
    seen = [event.stats.iteration_tokens for event in _run(engine) if isinstance(event, StepOutputs)]
    assert seen == [3 + 5, 2, 1, 1]


def test_a_request_ends_with_its_last_token(engine: Engine) -> None:
    _add(engine, 1, [5, 6, 7])
    outputs = _outputs(_run(engine), 1)
    assert [output.finish_reason for output in outputs] == [None, None, None, FinishReason.MAX_NEW_TOKENS]
    assert all(output.token_id >= 0 for output in outputs)


def test_a_request_that_fills_the_context_says_so(engine: Engine) -> None:
    _add(engine, 1, [5] * 126, new=50)
    assert _outputs(_run(engine), 1)[-1].finish_reason is FinishReason.CONTEXT_FULL


@pytest.mark.parametrize(
    ("prompt", "adapter", "reason"),
    [([], None, "PROMPT_LENGTH"), ([5] * 128, None, "PROMPT_LENGTH"), ([5, 99_999], None, "TOKEN_ID_RANGE"),
     ([-1], None, "TOKEN_ID_RANGE"), ([5], "nobody", "ADAPTER_NOT_FOUND")],
)  # fmt: skip
def test_a_bad_request_is_refused_and_the_next_is_answered(
    engine: Engine, prompt: list[int], adapter: str | None, reason: str
) -> None:
    _add(engine, 1, prompt, adapter=adapter)
    _add(engine, 2, [5, 6])
    events = _run(engine)
    failed = [event for event in events if isinstance(event, RequestFailed)]
    assert [(event.request_id, event.reason) for event in failed] == [(1, reason)]
    assert failed[0].field == ("adapter_id" if adapter else "text")
    assert len(_outputs(events, 2)) == 4


def test_a_full_queue_refuses_with_the_numbers(engine: Engine) -> None:
    for request_id in range(20):
        _add(engine, request_id, [5, 6])
    events = _run(engine)
    failed = [event for event in events if isinstance(event, RequestFailed)]
    assert {(event.reason, event.field) for event in failed} == {("QUEUE_FULL", "")}
    assert len(failed) == 20 - 6


def test_cancelled_requests_are_silent_and_free_everything(engine: Engine) -> None:
    for request_id in range(6):
        _add(engine, request_id, [5] * 30, new=20)
    events = engine.step() + engine.step()
    for request_id in (0, 2, 5, 77):
        engine.submit(CancelRequest(RequestId(request_id)))
    after = _run(engine)
    assert _outputs(events, 0)
    assert not any(_outputs(after, request_id) for request_id in (0, 2, 5))
    assert _outputs(after, 1)[-1].finish_reason is FinishReason.MAX_NEW_TOKENS


def test_a_deadline_ends_running_and_waiting_requests_alike(engine: Engine) -> None:
    for request_id in range(6):
        _add(engine, request_id, [5] * 20, new=90, deadline=time.time() + 0.05)
    events = engine.step()
    time.sleep(0.06)
    events += _run(engine)
    ends = [_outputs(events, request_id)[-1].finish_reason for request_id in range(6)]
    assert ends == [FinishReason.DEADLINE] * 6


def test_a_seed_gives_the_same_tokens_alone_and_among_others(engine: Engine) -> None:
    _add(engine, 1, [5, 6, 7], new=12, temperature=1.5, seed=3)
    alone = [output.token_id for output in _outputs(_run(engine), 1)]
    for request_id in range(2, 6):
        _add(engine, request_id, [8] * (3 * request_id), new=12, temperature=1.5, seed=request_id)
    _add(engine, 1, [5, 6, 7], new=12, temperature=1.5, seed=3)
    together = [output.token_id for output in _outputs(_run(engine), 1)]
    assert alone == together


def test_the_stats_count_each_step_s_tokens_and_estimate_the_wait(engine: Engine) -> None:
    """Six prompts of 30 tokens with four seats: every token is counted once, and two requests wait for a while."""
    for request_id in range(6):
        _add(engine, request_id, [5] * 30, new=5)
    stats = [event.stats for event in _run(engine) if isinstance(event, StepOutputs)]
    assert sum(item.iteration_tokens for item in stats) == 6 * (30 + 5 - 1)
    waits = [item.estimated_wait_seconds for item in stats]
    assert waits[0] > 0 and waits[-1] == 0
    assert all((item.estimated_wait_seconds > 0) == (item.waiting > 0) for item in stats)
    engine.step()
    assert engine.stats().iteration_tokens == 0


def test_an_id_that_is_still_in_use_is_refused(engine: Engine) -> None:
    _add(engine, 1, [5, 6])
    _add(engine, 1, [5, 6, 7])
    events = _run(engine)
    assert [event.reason for event in events if isinstance(event, RequestFailed)] == ["DUPLICATE_REQUEST_ID"]
    assert len(_outputs(events, 1)) == 4
