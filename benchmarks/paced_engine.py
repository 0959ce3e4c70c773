"""An engine without a model: one token for every running request at each step, at a steady pace."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from runtime.config import EngineConfig
from runtime.engine.messages import (
    AddRequest,
    CancelRequest,
    Command,
    EngineReady,
    EngineStats,
    Event,
    FinishReason,
    PauseRequest,
    SequenceOutput,
    StepOutputs,
)

MAX_MODEL_LEN = 1 << 20
STEP_SECONDS = "PACED_STEP_SECONDS"  # the environment variable that sets the pace


class PacedEngine:
    """Repeats each prompt's tokens until `max_new_tokens`; a step begins PACED_STEP_SECONDS after the one before."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None]) -> None:
        progress(1, 1)
        self.ready = EngineReady("deepseek_v3", MAX_MODEL_LEN, 1024, 1, 1 << 20, 1 << 30)
        self._step_seconds = float(os.environ[STEP_SECONDS])
        self._next_step = time.monotonic()
        self._inbox: list[Command] = []
        self._wake = threading.Condition()
        self._running: dict[int, AddRequest] = {}
        self._num_done: dict[int, int] = {}
        self._paused: set[int] = set()
        self._num_steps = 0

    def submit(self, command: Command) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def has_work(self) -> bool:
        return bool(self._inbox) or len(self._running) > len(self._paused)

    def wait_for_work(self, timeout_seconds: float) -> bool:
        with self._wake:
            return self._wake.wait_for(self.has_work, timeout_seconds)

    def close(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._running), kv_tokens_total=1 << 20, steps=self._num_steps)

    def step(self) -> list[Event]:
        time.sleep(max(0.0, self._next_step - time.monotonic()))
        self._next_step = max(self._next_step + self._step_seconds, time.monotonic() - self._step_seconds)
        with self._wake:
            inbox, self._inbox = self._inbox, []
        for command in inbox:
            self._obey(command)
        active = [request for request in self._running.values() if request.request_id not in self._paused]
        outputs = [self._advance(request) for request in active]
        self._num_steps += 1
        return [StepOutputs(outputs, self.stats())] if outputs else []

    def _obey(self, command: Command) -> None:
        match command:
            case AddRequest(request_id):
                self._running[request_id] = command
                self._num_done[request_id] = 0
            case CancelRequest(request_id):
                self._end(request_id)
            case PauseRequest(request_id, paused):
                (self._paused.add if paused and request_id in self._running else self._paused.discard)(request_id)

    def _advance(self, request: AddRequest) -> SequenceOutput:
        index = self._num_done[request.request_id]
        self._num_done[request.request_id] = index + 1
        token_id = request.prompt_ids[index % len(request.prompt_ids)]
        if index + 1 < request.params.max_new_tokens:
            return SequenceOutput(request.request_id, token_id)
        self._end(request.request_id)
        return SequenceOutput(request.request_id, token_id, finish_reason=FinishReason.MAX_NEW_TOKENS)

    def _end(self, request_id: int) -> None:
        self._running.pop(request_id, None)
        self._num_done.pop(request_id, None)
        self._paused.discard(request_id)
