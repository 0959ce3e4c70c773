"""Drives an engine in process as a front-end would: messages in, steps, events out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.messages import (
    AdapterInfo,
    AdapterReply,
    AddRequest,
    CallFailed,
    CallId,
    CancelRequest,
    EngineStats,
    Event,
    FinishReason,
    ListAdapters,
    LoadAdapter,
    PauseRequest,
    PromptScored,
    RequestAccepted,
    RequestFailed,
    RequestId,
    SequenceOutput,
    StepOutputs,
    TokenScore,
    UnloadAdapter,
)
from runtime.engine.sampling_params import SamplingParams

CALL_TIMEOUT_SECONDS = 60.0


@dataclass
class Outcome:
    """All that is known of one request: its tokens, the logits each was chosen from [vocab], and how it ended.

    `outputs` are those that came with a token; `prompt_scores` begin with the prompt's second token.
    """

    tokens: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    failure: RequestFailed | None = None
    generation: int = 0

    @property
    def ended(self) -> bool:
        """No more is to come."""
        return self.finish_reason is not None or self.failure is not None


class Driver:
    """Owns an engine, hands out ids, and sorts what the engine says by request and by call."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outcomes: dict[RequestId, Outcome] = {}
        self.stats = EngineStats()
        self._replies: dict[CallId, AdapterReply | CallFailed] = {}
        self._ids = itertools.count(1)
        engine.runner.observe_logits = self._observe

    def add(
        self,
        prompt_ids: Sequence[int],
        *,
        adapter: str | None = None,
        max_new_tokens: int = 16,
        min_new_tokens: int | None = None,
        params: SamplingParams | None = None,
        deadline: float | None = None,
    ) -> RequestId:
        """Submit a request: with `params`, or a greedy one that ends after exactly `max_new_tokens` unless told."""
        request_id = RequestId(next(self._ids))
        self.outcomes[request_id] = Outcome()
        least = max_new_tokens if min_new_tokens is None else min_new_tokens
        params = params or SamplingParams(max_new_tokens=max_new_tokens, min_new_tokens=least)
        self.engine.submit(AddRequest(request_id, list(prompt_ids), params, adapter, deadline))
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        """Ask for the end of a request; nothing more is expected of it."""
        self.engine.submit(CancelRequest(request_id))
        self.outcomes[request_id].finish_reason = FinishReason.CANCELLED

    def pause(self, request_id: RequestId, *, paused: bool) -> None:
        """Ask for a request to be kept out of the coming steps, or to go on."""
        self.engine.submit(PauseRequest(request_id, paused))

    def start_load(self, name: str, path: Path) -> CallId:
        """Ask for an adapter without waiting."""
        call_id = CallId(next(self._ids))
        self.engine.submit(LoadAdapter(call_id, name, str(path)))
        return call_id

    def load(self, name: str, path: Path) -> AdapterInfo:
        """Load an adapter and wait for it, other work going on."""
        return self._answer(self.start_load(name, path)).adapters[0]

    def start_unload(self, name: str) -> CallId:
        """Ask for the end of an adapter without waiting."""
        call_id = CallId(next(self._ids))
        self.engine.submit(UnloadAdapter(call_id, name))
        return call_id

    def unload(self, name: str) -> None:
        """Unload an adapter and wait for the answer."""
        self._answer(self.start_unload(name))

    def show(self, name: str) -> AdapterInfo:
        """The engine's present word on one adapter."""
        call_id = CallId(next(self._ids))
        self.engine.submit(ListAdapters(call_id, name))
        return self._answer(call_id).adapters[0]

    def answered(self, call_id: CallId) -> bool:
        """Whether the reply to a call has come."""
        return call_id in self._replies

    def step(self) -> None:
        """One engine step; its events are sorted into `outcomes`, the replies and `stats`."""
        for event in self.engine.step():
            self._take(event)

    def run(
        self, request_ids: Sequence[RequestId] | None = None, timeout_seconds: float = CALL_TIMEOUT_SECONDS
    ) -> None:
        """Step until these requests have ended, or all."""
        waited_for = list(self.outcomes) if request_ids is None else request_ids
        self._until(lambda: all(self.outcomes[request_id].ended for request_id in waited_for), timeout_seconds)

    def generate(self, prompt_ids: Sequence[int], *, adapter: str | None = None, max_new_tokens: int = 16) -> Outcome:
        """Run one request to its end, with whatever else is under way."""
        request_id = self.add(prompt_ids, adapter=adapter, max_new_tokens=max_new_tokens)
        self._until(lambda: self.outcomes[request_id].ended)
        return self.outcomes[request_id]

    def reply(self, call_id: CallId) -> AdapterReply:
        """The reply to a call, waiting for it."""
        return self._answer(call_id)

    def _answer(self, call_id: CallId) -> AdapterReply:
        self._until(lambda: call_id in self._replies)
        reply = self._replies[call_id]
        if isinstance(reply, CallFailed):
            raise AssertionError(f"{reply.reason}: {reply.message} {reply.problems}")
        return reply

    def _until(self, done: Callable[[], bool], timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> None:
        limit = time.monotonic() + timeout_seconds
        while not done():
            if time.monotonic() > limit:
                raise TimeoutError(f"the engine did not get there in {timeout_seconds} s; {self.stats}")
            self.step()
            if not self.engine.has_work():
                time.sleep(0.001)

    def _observe(self, request_ids: list[int], logits: Tensor) -> None:
        for request_id, row in zip(request_ids, logits, strict=True):
            if outcome := self.outcomes.get(RequestId(request_id)):
                outcome.logits.append(row.detach().float().cpu().clone())

    def _take(self, event: Event) -> None:
        match event:
            case StepOutputs(outputs=outputs, stats=stats):
                self.stats = stats
                for output in outputs:
                    outcome = self.outcomes[output.request_id]
                    if output.token_id >= 0:
                        outcome.tokens.append(output.token_id)
                        outcome.outputs.append(output)
                    outcome.finish_reason = output.finish_reason or outcome.finish_reason
            case PromptScored(request_id=request_id, scores=scores):
                if self.outcomes[request_id].outputs:
                    raise AssertionError(f"request {request_id}: prompt scores after the first token")
                self.outcomes[request_id].prompt_scores += scores
            case RequestAccepted(request_id=request_id, generation=generation):
                self.outcomes[request_id].generation = generation
            case RequestFailed(request_id=request_id):
                self.outcomes[request_id].failure = event
            case AdapterReply(call_id=call_id) | CallFailed(call_id=call_id):
                self._replies[call_id] = event


@contextmanager
def driven_engine(config: EngineConfig) -> Iterator[Driver]:
    """An engine for the length of a `with`, closed whatever happens."""
    engine = Engine(config)
    try:
        yield Driver(engine)
    finally:
        engine.close()
