"""Which sequences run in the next step: decodes first, then prefill chunks, and who begins, adapters taking turns."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

from runtime.engine.admission_pace import AdmissionPace
from runtime.engine.batch import Batch, Chunk, PromptTargets
from runtime.engine.fair_order import FairOrder
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
    """Owns the sequences and their blocks. A sequence is in `waiting` or in `running`, which holds blocks.

    A paused sequence stays where it is and is passed over. It keeps its blocks until others need them.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._by_id: dict[RequestId, Sequence] = {}
        self._awaiting: dict[RequestId, Sequence] = {}
        self._paused: dict[RequestId, Sequence] = {}
        self._pace = AdmissionPace()
        self._fair_order = FairOrder()

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)
        self._by_id[sequence.request_id] = sequence
        if sequence.awaits_parts:
            self._awaiting[sequence.request_id] = sequence

    def sequences(self) -> list[Sequence]:
        """Every sequence, running ones first."""
        return [*self.running, *self.waiting]

    def find(self, request_id: RequestId) -> Sequence | None:
        """The sequence of a request, if it has not ended."""
        return self._by_id.get(request_id)

    def pause(self, sequence: Sequence, *, paused: bool) -> None:
        """Keep a sequence out of the coming batches, or let it go on."""
        sequence.paused = paused
        if paused:
            self._paused[sequence.request_id] = sequence
        else:
            self._paused.pop(sequence.request_id, None)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it is and free its blocks."""
        if sequence.blocks:
            self._leave_running(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.free(sequence.blocks)
        del self._by_id[sequence.request_id]
        self._awaiting.pop(sequence.request_id, None)
        self._paused.pop(sequence.request_id, None)

    def watch_awaiting(self) -> None:
        """Sequences may have to wait for their adapters again."""
        self._awaiting = {item.request_id: item for item in self._by_id.values() if item.awaits_parts}

    def awaiting_adapters(self) -> list[Sequence]:
        """Sequences that have no place in a batch because their adapters have none on the device."""
        return [item for item in self._awaiting.values() if not item.blocks and item.awaits_adapter]

    def settle_awaiting(self) -> None:
        """Adapters may have come since the last step."""
        self._awaiting = {key: sequence for key, sequence in self._awaiting.items() if sequence.awaits_parts}

    @property
    def is_running(self) -> bool:
        """Whether a sequence has begun and is not paused."""
        return any(not sequence.paused for sequence in self.running)

    @property
    def num_paused(self) -> int:
        """How many sequences have begun and are paused."""
        return sum(bool(sequence.blocks) for sequence in self._paused.values())

    def can_run(self) -> bool:
        """Whether a step would compute anything: one that runs is not held, or one that waits could begin."""
        if any(not sequence.is_held for sequence in self.running):
            return True
        first = next(self._candidates(), None) if self._num_seats() > 0 else None
        return first is not None and self._has_room(self.blocks.blocks_for(len(first.token_ids)))

    def estimated_wait_seconds(self) -> float:
        """How long a request that came now would wait for its first step; 0 if none waits."""
        return self._pace.wait_seconds(time.monotonic(), self._num_ready())

    def schedule(self) -> Batch | None:
        """The next batch, ordered by adapter; None if nothing can run."""
        budget = self.limits.max_batch_tokens
        chunks = []
        # Resumed sequences may be more than there are seats: the youngest wait.
        active = [sequence for sequence in self.running if not sequence.is_held][: self.limits.max_batch_size]
        for sequence in active:
            if sequence.num_pending == 1 and budget and self._grow(sequence):
                chunks.append(self._chunk(sequence, 1))
                budget -= 1
        for sequence in active:
            if sequence.blocks and sequence.num_pending > 1 and budget:
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].token_ids)
        admitted = self._admit(budget)
        for sequence in admitted:
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].token_ids)
        self._pace.update(time.monotonic(), len(admitted), self._num_ready())
        if not chunks:
            return None
        return Batch(sorted(chunks, key=lambda chunk: chunk.slot))

    def sampling_sequences(self, batch: Batch) -> list[Sequence]:
        """The sequences that a batch gives a token, in its order."""
        return [self._by_id[chunk.request_id] for chunk in batch.chunks if chunk.samples]

    def update(self, batch: Batch, token_ids: Items[int]) -> list[tuple[Sequence, FinishReason | None]]:
        """Account for a batch that ran: `token_ids` are the new tokens of its sampling chunks, in order.

        Returns each sequence that got a token, with the reason if that ended it; ended ones are removed. A chunk that
        reached the last token but does not sample leaves it to be computed again.
        """
        tokens = iter(token_ids)
        outcome = []
        for chunk in batch.chunks:
            sequence = self._by_id[chunk.request_id]
            sequence.num_computed += len(chunk.token_ids)
            if chunk.targets is not None:
                sequence.next_to_score += len(chunk.targets.token_ids)
            if not chunk.samples:
                sequence.num_computed = min(sequence.num_computed, len(sequence.token_ids) - 1)
                continue
            sequence.token_ids.append(next(tokens))
            reason = self._finish_reason(sequence)
            if reason is not None:
                self.remove(sequence)
            outcome.append((sequence, reason))
        return outcome

    def _num_ready(self) -> int:
        """Waiting sequences that are not held, in constant time; exact after `settle_awaiting`."""
        paused = sum(not sequence.blocks and not sequence.awaits_parts for sequence in self._paused.values())
        return len(self.waiting) - len(self._awaiting) - paused

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token, preempting others if need be; False: itself preempted."""
        if not sequence.blocks:
            return False  # an older sequence has just taken them
        while len(sequence.blocks) * self.blocks.block_tokens < len(sequence.token_ids):
            if self.blocks.can_allocate(1):
                sequence.blocks += self.blocks.allocate(1)
                continue
            victim = self._victim()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _victim(self) -> Sequence:
        """Who gives up its blocks first: the youngest paused sequence, else the youngest."""
        return next((sequence for sequence in reversed(self.running) if sequence.paused), self.running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its tokens are kept and recomputed later."""
        self._leave_running(sequence)
        self.blocks.free(sequence.blocks)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _leave_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.adapter is not None:
            sequence.adapter.num_running -= 1

    def _admit(self, budget: int) -> list[Sequence]:
        """Move sequences from waiting to running while tokens, seats and blocks last.

        A sequence gets the blocks of all its tokens at once, so that half-computed prompts cannot block each other.
        One that is held is passed over; one that lacks blocks is not, or it would never run.
        """
        admitted: list[Sequence] = []
        seats = self._num_seats()
        if budget <= 0 or seats <= 0:
            return admitted
        for sequence in self._candidates():
            needed = self.blocks.blocks_for(len(sequence.token_ids))
            if not self._make_room(needed):
                break
            self.waiting.remove(sequence)
            sequence.blocks += self.blocks.allocate(needed)
            self.running.append(sequence)
            if sequence.adapter is not None:
                sequence.adapter.num_running += 1
                sequence.adapter.has_run = True
            self._fair_order.give(sequence)
            if sequence.queue_seconds is None:
                sequence.queue_seconds = time.monotonic() - sequence.arrived
            admitted.append(sequence)
            budget -= sequence.num_pending
            if budget <= 0 or len(admitted) >= seats:
                break
        return admitted

    def _num_seats(self) -> int:
        """Places that are free in a batch."""
        return self.limits.max_batch_size - sum(not sequence.paused for sequence in self.running)

    def _candidates(self) -> Iterator[Sequence]:
        """Who may begin, in the order in which they do."""
        ready = [sequence for sequence in self.waiting if not sequence.is_held]
        return self._fair_order.order(ready, [sequence for sequence in self.running if not sequence.paused])

    def _make_room(self, num_blocks: int) -> bool:
        """Whether so many blocks are free, if need be after paused sequences gave up theirs, youngest first."""
        if not self._has_room(num_blocks):
            return False
        paused = [sequence for sequence in self.running if sequence.paused]
        while not self.blocks.can_allocate(num_blocks):
            self._preempt(paused.pop())
        return True

    def _has_room(self, num_blocks: int) -> bool:
        """Whether so many blocks are free, or would be without the paused sequences."""
        paused = sum(len(sequence.blocks) for sequence in self.running if sequence.paused)
        return self.blocks.can_allocate(num_blocks) or num_blocks <= self.blocks.num_free + paused

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        stop = min(sequence.num_computed + budget, len(sequence.token_ids))
        return Chunk(
            request_id=sequence.request_id,
            token_ids=sequence.token_ids[sequence.num_computed : stop],
            start=sequence.num_computed,
            blocks=list(sequence.blocks),
            slot=sequence.slot,
            samples=stop == len(sequence.token_ids),
            targets=_targets(sequence, stop) if sequence.params.score_prompt else None,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.token_ids[-1] in self.limits.eos_token_ids:
            return FinishReason.EOS
        if sequence.num_generated >= sequence.params.max_new_tokens:
            return FinishReason.MAX_NEW_TOKENS
        if len(sequence.token_ids) >= self.limits.max_model_len:
            return FinishReason.CONTEXT_FULL
        return None


def _targets(sequence: Sequence, stop: int) -> PromptTargets | None:
    """The prompt tokens that a chunk up to `stop` is the first to predict, though perhaps not the first to compute."""
    first = sequence.next_to_score
    token_ids = sequence.token_ids[first : min(stop + 1, sequence.num_prompt_tokens)]
    if not token_ids:
        return None
    return PromptTargets(first - 1 - sequence.num_computed, token_ids, sequence.params.num_top_tokens)
