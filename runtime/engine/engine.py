"""The engine: one base model, many adapters, continuous batching. Start reading at `Engine.step`."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from runtime.adapters.record import AdapterRecord
from runtime.config import EngineConfig
from runtime.engine.adapter_calls import AdapterCalls
from runtime.engine.batch import Batch
from runtime.engine.messages import (
    AdapterCall,
    AdapterChanged,
    AddRequest,
    CancelRequest,
    Command,
    EngineStats,
    Event,
    FinishReason,
    PauseRequest,
    PromptScored,
    RequestAccepted,
    RequestFailed,
    RequestId,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    TokenScore,
)
from runtime.engine.runner import StepResult
from runtime.engine.sampler import SampledToken
from runtime.engine.sequence import Sequence
from runtime.engine.start import start
from runtime.errors import Aborted, ErrorKind, Exhausted, GraftError, Internal, InvalidRequest, NotFound


class Engine:
    """Commands come in through `submit`, from any thread; `step` runs in one thread and returns what happened."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        """Load the base and warm up. Raises ValueError or CheckpointError with what is wrong and where."""
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake = threading.Event()
        parts = start(config, self._wake.set, progress)
        self.config = config
        self.ready = parts.ready
        self.scheduler = parts.scheduler
        self.runner = parts.runner
        self.adapters = parts.adapters
        self.guides = parts.guides
        self.sampler = parts.sampler
        self._cores = parts.cores
        self._events: list[Event] = []
        self._adapter_calls = AdapterCalls(parts.adapters, self._emit)
        parts.adapters.on_change = lambda info: self._emit(AdapterChanged(info))
        self._num_steps = 0
        self._last_step_seconds = 0.0
        self._num_prompt_tokens = 0
        # No sequence is due before this Unix time; the sequence that it was taken from may have ended.
        self._next_deadline = math.inf

    def submit(self, command: Command) -> None:
        """Hand over a command; it takes effect before the next step. `Shutdown` is for the process around it."""
        self._inbox.put(command)
        self._wake.set()

    def has_work(self) -> bool:
        """Whether `step` would do anything now."""
        if self.scheduler.can_run() or not self._inbox.empty():
            return True
        if self.adapters.has_work or self.guides.has_news:
            return True
        if self.adapters.can_compact and not self.scheduler.is_running:
            return True
        return time.time() >= self._next_deadline

    def wait_for_work(self, timeout_seconds: float) -> bool:
        """Sleep until there is something to do (a command, a loaded file, a guide, a deadline) or the time is over."""
        if self.has_work():
            return True
        due_seconds = min(self._next_deadline - time.time(), self.adapters.next_due - time.monotonic())
        self._wake.wait(max(0.0, min(timeout_seconds, due_seconds)))
        self._wake.clear()
        return self.has_work()

    def step(self) -> list[Event]:
        """One step: take commands, let in loaded adapters and guides, pick a batch, run it, account for its tokens."""
        self.adapters.lend_cores(self._last_step_seconds)
        begun = time.monotonic()
        self._drain_inbox()
        self.adapters.advance(whole=not self.scheduler.is_running)
        if self.adapters.have_left:
            self.adapters.have_left = False
            self.scheduler.watch_awaiting()
        self.guides.take_answers()
        self._end_lost()
        self._end_overdue()
        batch = self.scheduler.schedule()
        if batch is not None:
            with self._cores:
                result = self.runner.run(batch)
            self.guides.settle()
            batch, logits = self._leave_out_unready(batch, result.logits)
            tokens = self.sampler.sample(logits, self.scheduler.sampling_sequences(batch))
            self._finish_step(batch, result, tokens)
        self._last_step_seconds = time.monotonic() - begun if batch is not None else 0.0
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Stop the threads and processes of the engine."""
        self.adapters.close()
        self.guides.shut_down()

    def stats(self, iteration_tokens: int = 0) -> EngineStats:
        """Counters and gauges of this moment; a step adds how many tokens it computed."""
        blocks = self.scheduler.blocks
        device, host = self.adapters.memory.device.counts, self.adapters.memory.host.counts
        awaiting = [item.adapter for item in self.scheduler.awaiting_adapters() if item.adapter is not None]
        num_for_device = sum(self.adapters.waits_for_place(adapter) for adapter in awaiting)
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            paused=self.scheduler.num_paused,
            kv_tokens_used=(blocks.num_blocks - blocks.num_free) * blocks.block_tokens,
            kv_tokens_total=blocks.num_blocks * blocks.block_tokens,
            preemptions=self.scheduler.num_preemptions,
            steps=self._num_steps,
            prompt_tokens=self._num_prompt_tokens,
            adapters_resident=self.adapters.num_resident,
            adapter_device_bytes=self.adapters.pages.num_bytes,
            adapter_vacant_bytes=self.adapters.pages.vacant_bytes,
            adapter_host_bytes=self.adapters.host_bytes,
            iteration_tokens=iteration_tokens,
            estimated_wait_seconds=self.scheduler.estimated_wait_seconds(),
            adapter_device_hits=device.hits,
            adapter_device_loads=device.loads,
            adapter_device_evictions=device.evictions,
            adapter_host_hits=host.hits,
            adapter_host_loads=host.loads,
            adapter_host_evictions=host.evictions,
            waiting_for_files=len(awaiting) - num_for_device,
            waiting_for_device=num_for_device,
        )

    def _drain_inbox(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._take(self._inbox.get_nowait())

    def _take(self, command: Command) -> None:
        match command:
            case AddRequest():
                self._add(command)
            case CancelRequest():
                sequence = self.scheduler.find(command.request_id)
                if sequence is not None:
                    self._end(sequence)
            case PauseRequest():
                sequence = self.scheduler.find(command.request_id)
                if sequence is not None:
                    self.scheduler.pause(sequence, paused=command.paused)
            case Shutdown():
                pass
            case _:
                self._call(command)

    def _call(self, command: AdapterCall) -> None:
        for record in self._adapter_calls.take(command):
            error = Aborted(f"adapter {record.name!r} was unloaded by force", reason="ADAPTER_UNLOADED")
            self._fail_users(record, error, begun=True)

    def _fail_users(self, record: AdapterRecord, error: GraftError, *, begun: bool) -> None:
        """End the requests of a generation with an error: all of them, or only those that have no place in a batch."""
        for sequence in self.scheduler.sequences():
            if sequence.adapter is record and (begun or not sequence.blocks):
                self._end(sequence)
                self._fail(sequence.request_id, error)

    def _add(self, request: AddRequest) -> None:
        adapter: AdapterRecord | None = None
        try:
            self._check(request)
            if request.adapter is not None:
                adapter = self.adapters.acquire(request.adapter)
        except GraftError as error:
            if isinstance(error, NotFound):
                error.field = "adapter_id"  # only the name is known where the adapter was looked up
            self._fail(request.request_id, error)
            return
        if adapter is not None:
            self._emit(RequestAccepted(request.request_id, adapter.name, adapter.generation, adapter.label))
        self._num_prompt_tokens += len(request.prompt_ids)
        spec = request.params.guide
        guide = self.guides.open(request.request_id, spec) if spec is not None else None
        self.scheduler.add(Sequence.from_request(request, adapter, guide))
        if request.deadline is not None:
            self._next_deadline = min(self._next_deadline, request.deadline)

    def _check(self, request: AddRequest) -> None:
        """The engine's own bounds; front-ends check the rest, and these too, with the client's field names."""
        try:
            request.params.validate()
        except ValueError as error:
            raise InvalidRequest(str(error), reason="INVALID_PARAMETER", field="params") from error
        length, limit = len(request.prompt_ids), self.ready.max_model_len
        if not 1 <= length < limit:
            message = f"the prompt has {length} tokens; this server takes 1 to {limit - 1}"
            raise InvalidRequest(message, reason="PROMPT_LENGTH", field="text")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.ready.vocab_size:
            raise InvalidRequest(
                f"token ids must be 0..{self.ready.vocab_size - 1}", reason="TOKEN_ID_RANGE", field="text"
            )
        if self.scheduler.find(request.request_id) is not None:
            message = f"request id {request.request_id} is that of a request that has not ended"
            raise InvalidRequest(message, reason="DUPLICATE_REQUEST_ID", field="request_id")
        if len(self.scheduler.waiting) >= self.config.max_waiting_requests:
            message = f"{len(self.scheduler.waiting)} requests are waiting, the most that may: retry later"
            raise Exhausted(message, reason="QUEUE_FULL", retry_seconds=1.0)

    def _end_lost(self) -> None:
        """End the requests whose adapter could not be brought here, and those whose guide cannot be followed."""
        for record, error in self.adapters.take_failures():
            self._fail_users(record, error, begun=False)
        self.scheduler.settle_awaiting()
        self._end_long_waits()
        for guide in self.guides.take_failed():
            guided = self.scheduler.find(guide.request_id)
            if guided is not None and guide.error is not None:
                self._end(guided)
                self._fail(guide.request_id, guide.error)

    def _end_long_waits(self) -> None:
        """End the requests that have waited too long for their adapter's place; what is being read takes its time."""
        bound = self.config.max_adapter_wait_seconds
        since = time.monotonic() - bound
        for sequence in self.scheduler.awaiting_adapters():
            adapter = sequence.adapter
            if adapter is None or sequence.arrived > since or not self.adapters.waits_for_place(adapter):
                continue
            self._end(sequence)
            self._fail(sequence.request_id, self.adapters.no_place(adapter, bound))

    def _end_overdue(self) -> None:
        """End the requests whose deadline has passed; all are looked through only when the next one is due."""
        now = time.time()
        if now < self._next_deadline:
            return
        outputs = []
        self._next_deadline = math.inf
        for sequence in self.scheduler.sequences():
            if sequence.deadline is None:
                continue
            if now >= sequence.deadline:
                self._end(sequence)
                outputs.append(SequenceOutput(sequence.request_id, finish_reason=FinishReason.DEADLINE))
            else:
                self._next_deadline = min(self._next_deadline, sequence.deadline)
        if outputs:
            self._events.append(StepOutputs(outputs, self.stats()))

    def _leave_out_unready(self, batch: Batch, logits_BV: Tensor) -> tuple[Batch, Tensor]:
        """The batch and its logits without the rows whose guide is late: they give no token, and are computed again."""
        sequences = self.scheduler.sampling_sequences(batch)
        ready = [row for row, item in enumerate(sequences) if item.guide is None or item.guide.is_ready]
        if len(ready) == len(sequences):
            return batch, logits_BV
        kept = {sequences[row].request_id for row in ready}
        return batch.sampling_only(kept), logits_BV[torch.tensor(ready, dtype=torch.int64, device=logits_BV.device)]

    def _finish_step(self, batch: Batch, result: StepResult, tokens: list[SampledToken]) -> None:
        self._num_steps += 1
        outcome = self.scheduler.update(batch, [token.token_id for token in tokens])
        not_numbers = self._tell_prompt_scores(result.prompt_scores)
        outputs = []
        guided = []
        for (sequence, reason), token in zip(outcome, tokens, strict=True):
            if reason is not None:
                self._release(sequence)
            if not token.is_finite:
                not_numbers.add(sequence.request_id)
            elif sequence.request_id not in not_numbers:
                outputs.append(_output(sequence, token, reason))
                if sequence.guide is not None and reason is None:
                    guided.append((sequence.guide, token.token_id))
        self.guides.accept(guided)
        for request_id in not_numbers:
            self._break_off(request_id)
        self._events.append(StepOutputs(outputs, self.stats(batch.num_tokens)))

    def _tell_prompt_scores(self, prompt_scores: dict[RequestId, list[TokenScore]]) -> set[RequestId]:
        """Send the scores of this step's prompt tokens; returns the requests whose scores are not numbers."""
        not_numbers = set()
        for request_id, scores in prompt_scores.items():
            if all(math.isfinite(score.logprob) for score in scores):
                self._events.append(PromptScored(request_id, scores))
            else:
                not_numbers.add(request_id)
        return not_numbers

    def _break_off(self, request_id: RequestId) -> None:
        """End a request whose logits are not numbers: weights that overflow must not pass for an answer."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            self._end(sequence)
        message = "the model's output for this request is not a number; its adapter's weights may be too large"
        self._fail(request_id, Internal(message, reason="NON_FINITE_OUTPUT"))

    def _end(self, sequence: Sequence) -> None:
        """Free everything a sequence holds."""
        self.scheduler.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back what a sequence holds beside its blocks."""
        if sequence.adapter is not None:
            self.adapters.release(sequence.adapter)
        if sequence.guide is not None:
            self.guides.close(sequence.guide)

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _fail(self, request_id: RequestId, error: GraftError) -> None:
        kind: ErrorKind = error.kind
        told = (error.message, error.reason, error.field, error.retry_seconds)
        self._events.append(RequestFailed(request_id, kind, *told))


def _output(sequence: Sequence, token: SampledToken, reason: FinishReason | None) -> SequenceOutput:
    return SequenceOutput(
        sequence.request_id,
        token.token_id,
        token.logprob,
        token.rank,
        token.top_tokens,
        reason,
        sequence.queue_seconds if sequence.num_generated == 1 else None,
    )
