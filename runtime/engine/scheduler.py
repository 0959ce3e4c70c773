"""Which sequences run in the next step: decodes first, then prefill chunks, oldest request first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from runtime.engine.batch import Batch, Chunk
from runtime.engine.kv_cache import BlockPool
from runtime.engine.messages import FinishReason, RequestId
from runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of one step and of one sequence."""

    max_batch_tokens: int
    max_batch_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


class Scheduler:
    """Owns the sequences and their blocks. A sequence is in `waiting` or in `running`, which holds blocks."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def sequences(self) -> list[Sequence]:
        """Every sequence, running ones first."""
        return [*self.running, *self.waiting]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it is and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.free(sequence.blocks)

    def can_run(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.running) or any(not sequence.awaits_adapter for sequence in self.waiting)

    def schedule(self) -> Batch | None:
        """The next batch, ordered by adapter; None if nothing can run."""
        budget = self.limits.max_batch_tokens
        chunks = []
        for sequence in list(self.running):
            if sequence.num_pending == 1 and budget and self._grow(sequence):
                chunks.append(self._chunk(sequence, 1))
                budget -= 1
        for sequence in self.running:
            if sequence.num_pending > 1 and budget:
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].token_ids)
        for sequence in self._admit(budget):
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].token_ids)
        if not chunks:
            return None
        return Batch(sorted(chunks, key=lambda chunk: chunk.slot))

    def update(self, batch: Batch, token_ids: Items[int]) -> list[tuple[Sequence, FinishReason | None]]:
        """Account for a batch that ran: `token_ids` are the new tokens of its sampling chunks, in order.

        Returns each sequence that got a token, with the reason if that ended it; ended ones are removed.
        """
        by_id = {sequence.request_id: sequence for sequence in self.running}
        tokens = iter(token_ids)
        outcome = []
        for chunk in batch.chunks:
            sequence = by_id[chunk.request_id]
            sequence.num_computed += len(chunk.token_ids)
            if not chunk.samples:
                continue
            sequence.token_ids.append(next(tokens))
            reason = self._finish_reason(sequence)
            if reason is not None:
                self.remove(sequence)
            outcome.append((sequence, reason))
        return outcome

    def find(self, request_id: RequestId) -> Sequence | None:
        """The sequence of a request, if it has not ended."""
        return next((sequence for sequence in self.sequences() if sequence.request_id == request_id), None)

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token, preempting the youngest sequences if need be; False: itself preempted."""
        if sequence not in self.running:
            return False  # an older sequence has just taken its blocks
        while len(sequence.blocks) * self.blocks.block_tokens < len(sequence.token_ids):
            if self.blocks.can_allocate(1):
                sequence.blocks += self.blocks.allocate(1)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its tokens are kept and recomputed later."""
        self.running.remove(sequence)
        self.blocks.free(sequence.blocks)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, budget: int) -> list[Sequence]:
        """Move sequences from waiting to running while tokens, seats and blocks last.

        A sequence gets the blocks of all its tokens at once, so that half-computed prompts cannot block each other.
        One whose adapter is loading is passed over; one that lacks blocks is not, or it would never run.
        """
        admitted: list[Sequence] = []
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.limits.max_batch_size:
                break
            if sequence.awaits_adapter:
                continue
            needed = self.blocks.blocks_for(len(sequence.token_ids))
            if not self.blocks.can_allocate(needed):
                break
            self.waiting.remove(sequence)
            sequence.blocks += self.blocks.allocate(needed)
            self.running.append(sequence)
            if sequence.queue_seconds is None:
                sequence.queue_seconds = time.monotonic() - sequence.arrived
            admitted.append(sequence)
            budget -= sequence.num_pending
        return admitted

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        stop = min(sequence.num_computed + budget, len(sequence.token_ids))
        return Chunk(
            request_id=sequence.request_id,
            token_ids=sequence.token_ids[sequence.num_computed : stop],
            start=sequence.num_computed,
            blocks=list(sequence.blocks),
            slot=sequence.slot,
            samples=stop == len(sequence.token_ids),
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.token_ids[-1] in self.limits.eos_token_ids:
            return FinishReason.EOS
        if sequence.num_generated >= sequence.params.max_new_tokens:
            return FinishReason.MAX_NEW_TOKENS
        if len(sequence.token_ids) >= self.limits.max_model_len:
            return FinishReason.CONTEXT_FULL
        return None
