"""Guides of one engine: tried and followed beside the steps, and as a rule ready when the next step needs them."""

from __future__ import annotations

import itertools
import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

from runtime.engine.guides.guide import Guide
from runtime.engine.guides.lanes import Accept, CheckLane, Follow, FollowLane, Leave, Mask, Verdict, field_of
from runtime.engine.guides.protocol import WorkerSetup
from runtime.engine.messages import RequestId
from runtime.engine.sampling_params import GuideSpec
from runtime.errors import ErrorKind, Exhausted, GraftError, InvalidRequest, Precondition

MAX_GUIDE_BYTES = 16 * 1024
MAX_PENDING_CHECKS = 256
# A step waits so long for masks after the model has run. A guide that is not there then is slow, until it answers
# faster than that; meanwhile its sequence takes part in a step only when it is ready.
SETTLE_SECONDS = 0.02
STEP_SECONDS = 1.0
CHECK_MEMORY_BYTES = 2**30
FOLLOW_MEMORY_BYTES = 4 * 2**30
_CHECK_NICENESS = 10


def make_setup(
    tokenizer: str, vocab_size: int, eos_token_ids: Iterable[int], *, cache_entries: int, compile_seconds: float
) -> WorkerSetup:
    """What the processes of a store must know: the model's tokenizer.json and its logits' width."""
    return WorkerSetup(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=sorted(eos_token_ids),
        cache_entries=cache_entries,
        compile_seconds=compile_seconds,
        step_seconds=STEP_SECONDS,
        max_memory_bytes=FOLLOW_MEMORY_BYTES,
        niceness=0,
    )


class GuideStore:
    """Owned by the engine loop, which calls every method. Threads and processes start with the first guide."""

    def __init__(self, setup: WorkerSetup, wake: Callable[[], None]) -> None:
        self._setup = setup
        self._wake = wake
        self._ids = itertools.count(1)
        self._guides: dict[int, Guide] = {}
        self._verdicts: OrderedDict[GuideSpec, GraftError | None] = OrderedDict()
        self._unchecked: dict[GuideSpec, list[Guide]] = {}
        self._awaited: set[Guide] = set()
        self._failed: list[Guide] = []
        self._answers: queue.SimpleQueue[Verdict | Mask] = queue.SimpleQueue()
        self._lanes: tuple[CheckLane, FollowLane] | None = None

    @property
    def has_news(self) -> bool:
        """Whether `take_answers` or `take_failed` has something to do."""
        return bool(self._failed) or not self._answers.empty()

    @property
    def num_open(self) -> int:
        """Guides that were opened and not closed."""
        return len(self._guides)

    def open(self, request_id: RequestId, spec: GuideSpec) -> Guide:
        """A guide for one request, not ready yet; what is wrong with it is told by `take_failed`, now or later."""
        guide = Guide(next(self._ids), request_id, spec)
        self._guides[guide.guide_id] = guide
        error = self._refusal(spec)
        if error is not None:
            self._fail(guide, error)
        elif spec in self._verdicts:
            self._verdicts.move_to_end(spec)
            self._judge(guide, self._verdicts[spec])
        else:
            if spec not in self._unchecked:
                self._check_lane.put(spec)
            self._unchecked.setdefault(spec, []).append(guide)
        return guide

    def accept(self, tokens: list[tuple[Guide, int]]) -> None:
        """The tokens that one step gave to guided sequences."""
        now = time.monotonic()
        for guide, _ in tokens:
            guide.ask(now)
            if not guide.is_slow:
                self._awaited.add(guide)
        if tokens:
            self._follow_lane.put([Accept(guide.guide_id, token_id) for guide, token_id in tokens])

    def close(self, guide: Guide) -> None:
        """Its request has ended."""
        del self._guides[guide.guide_id]
        self._awaited.discard(guide)
        waiting = self._unchecked.get(guide.spec, [])
        if guide in waiting:
            waiting.remove(guide)
            if not waiting:
                del self._unchecked[guide.spec]
                self._check_lane.give_up(guide.spec)
        elif self._lanes is not None:
            self._follow_lane.put([Leave(guide.guide_id)])

    def take_answers(self) -> None:
        """Take what the processes have found out so far."""
        while not self._answers.empty():
            self._take(self._answers.get())

    def settle(self) -> None:
        """Wait a moment for the guides that are due."""
        stop = time.monotonic() + SETTLE_SECONDS
        while self._awaited:
            try:
                self._take(self._answers.get(timeout=max(0.0, stop - time.monotonic())))
            except queue.Empty:
                for guide in self._awaited:
                    guide.is_slow = True
                self._awaited.clear()

    def take_failed(self) -> list[Guide]:
        """The open guides that have got an error since the last call."""
        failed, self._failed = self._failed, []
        return [guide for guide in failed if guide.guide_id in self._guides]

    def shut_down(self) -> None:
        """End threads and processes, whatever they are at."""
        for lane in self._lanes or ():
            lane.close()

    @property
    def _check_lane(self) -> CheckLane:
        return self._started_lanes()[0]

    @property
    def _follow_lane(self) -> FollowLane:
        return self._started_lanes()[1]

    def _started_lanes(self) -> tuple[CheckLane, FollowLane]:
        if self._lanes is None:
            check_setup = replace(self._setup, max_memory_bytes=CHECK_MEMORY_BYTES, niceness=_CHECK_NICENESS)
            self._lanes = (CheckLane(check_setup, self._tell), FollowLane(self._setup, self._tell))
        return self._lanes

    def _tell(self, answer: Verdict | Mask) -> None:
        """Called by the lanes' threads: the engine loop takes it from here."""
        self._answers.put(answer)
        self._wake()

    def _refusal(self, spec: GuideSpec) -> GraftError | None:
        """What can be said against a guide without looking into it."""
        if not self._setup.eos_token_ids:
            message = "guided decoding needs a model that names its end-of-sequence token"
            return Precondition(message, reason="GUIDES_UNAVAILABLE", field=field_of(spec))
        try:
            num_bytes = len(spec.source.encode())
        except UnicodeEncodeError:
            return InvalidRequest("the guide is not valid Unicode", reason="GUIDE_INVALID", field=field_of(spec))
        if num_bytes > MAX_GUIDE_BYTES:
            message = f"the guide has {num_bytes} bytes; this server takes {MAX_GUIDE_BYTES}"
            return InvalidRequest(message, reason="GUIDE_TOO_COMPLEX", field=field_of(spec))
        if spec not in self._verdicts and spec not in self._unchecked and len(self._unchecked) >= MAX_PENDING_CHECKS:
            message = f"{len(self._unchecked)} guides are waiting to be compiled, the most that may: retry later"
            return Exhausted(message, reason="GUIDE_QUEUE_FULL", retry_seconds=1.0)
        return None

    def _judge(self, guide: Guide, error: GraftError | None) -> None:
        """What the verdict on its spec means for a guide."""
        if error is None:
            self._follow_lane.put([Follow(guide.guide_id, guide.spec)])
        else:
            self._fail(guide, error)

    def _fail(self, guide: Guide, error: GraftError) -> None:
        guide.fail(error)
        self._failed.append(guide)

    def _take(self, answer: Verdict | Mask) -> None:
        if isinstance(answer, Verdict):
            self._take_verdict(answer)
        else:
            self._take_mask(answer)

    def _take_verdict(self, verdict: Verdict) -> None:
        self._remember(verdict)
        for guide in self._unchecked.pop(verdict.spec, []):
            self._judge(guide, verdict.error)

    def _take_mask(self, mask: Mask) -> None:
        if mask.verdict is not None:
            self._remember(mask.verdict)
        guide = self._guides.get(mask.guide_id)
        if guide is None:
            return
        self._awaited.discard(guide)
        if guide.asked_at is not None and mask.answered_at - guide.asked_at < SETTLE_SECONDS:
            guide.is_slow = False
        if mask.error is not None:
            self._fail(guide, mask.error)
        else:
            guide.allow(mask.bits)

    def _remember(self, verdict: Verdict) -> None:
        """Keep verdicts on the guides themselves, not failures of the moment."""
        if verdict.error is not None and verdict.error.kind is not ErrorKind.INVALID_ARGUMENT:
            return
        self._verdicts[verdict.spec] = verdict.error
        self._verdicts.move_to_end(verdict.spec)
        while len(self._verdicts) > self._setup.cache_entries:
            self._verdicts.popitem(last=False)
