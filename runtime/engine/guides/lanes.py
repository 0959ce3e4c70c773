"""Two threads, each with a guide process of its own: one tries new guides, the other follows those that passed.

A guide that takes too long or too much ends its process. In the first lane nothing else is lost; in the second the
others are opened again with the tokens that they have. A process that ends otherwise than by its clock may have been
ended by all guides together, or from outside: a guide is to blame only if it ends the next process too. The threads
only wait: all work is done by the processes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from runtime.engine.guides.process import GuideProcess, ProcessEnded
from runtime.engine.guides.protocol import (
    AdvanceGuide,
    Allowed,
    Answer,
    CheckGuide,
    CloseGuide,
    Job,
    OpenGuide,
    WorkerSetup,
)
from runtime.engine.sampling_params import GuideKind, GuideSpec
from runtime.errors import Exhausted, GraftError, InvalidRequest

_NOUNS = {
    GuideKind.JSON_SCHEMA: "JSON schema",
    GuideKind.REGEX: "regular expression",
    GuideKind.CHOICE: "list of choices",
    GuideKind.GRAMMAR: "grammar",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a guide can be followed."""

    spec: GuideSpec
    error: GraftError | None


@dataclass(frozen=True)
class Mask:
    """What may come next in one sequence, or why its guide cannot be followed further.

    With a `verdict`, nobody else should try that guide either.
    """

    guide_id: int
    bits: bytes = b""
    error: GraftError | None = None
    verdict: Verdict | None = None
    answered_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Follow:
    """Order: open a guide for a sequence."""

    guide_id: int
    spec: GuideSpec


@dataclass(frozen=True)
class Accept:
    """Order: the sequence has a new token."""

    guide_id: int
    token_id: int


@dataclass(frozen=True)
class Leave:
    """Order: the sequence has ended."""

    guide_id: int


Order = Follow | Accept | Leave


class CheckLane:
    """Tries one guide after the other; `tell` is called from its thread."""

    def __init__(self, setup: WorkerSetup, tell: Callable[[Verdict], None]) -> None:
        self._process = GuideProcess(setup)
        self._tell = tell
        self._specs: queue.SimpleQueue[GuideSpec | None] = queue.SimpleQueue()
        self._wanted: set[GuideSpec] = set()
        self._thread = _start(self._run, "guide-check")

    def put(self, spec: GuideSpec) -> None:
        """Try a guide; one verdict will be told, unless it is given up before its turn."""
        self._wanted.add(spec)
        self._specs.put(spec)

    def give_up(self, spec: GuideSpec) -> None:
        """Nobody wants this guide any more."""
        self._wanted.discard(spec)

    def close(self) -> None:
        """End the process, whatever it does, and the thread."""
        self._specs.put(None)
        self._process.close()
        self._thread.join()

    def _run(self) -> None:
        while (spec := self._specs.get()) is not None:
            if spec in self._wanted:
                self._wanted.discard(spec)
                self._tell(Verdict(spec, self._try(spec)))

    def _try(self, spec: GuideSpec) -> GraftError | None:
        try:
            self._process.ensure_started()
            (answer,) = self._process.ask([CheckGuide(spec.kind.value, spec.source)])
        except ProcessEnded as end:
            return _invalid(spec, "GUIDE_TOO_COMPLEX", str(end))
        except GraftError as error:
            return error
        return None if isinstance(answer, Allowed) else _invalid(spec, answer.reason, answer.message)


class FollowLane:
    """Computes the masks of all guided sequences; `tell` is called from its thread, once for each Follow and Accept."""

    def __init__(self, setup: WorkerSetup, tell: Callable[[Mask], None]) -> None:
        self._process = GuideProcess(setup)
        self._tell = tell
        self._orders: queue.SimpleQueue[list[Order] | None] = queue.SimpleQueue()
        self._live: dict[int, _Live] = {}
        self._closed = False
        self._thread = _start(self._run, "guide-follow")

    def put(self, orders: list[Order]) -> None:
        """Hand over what one step brought."""
        self._orders.put(orders)

    def close(self) -> None:
        """End the process, whatever it does, and the thread."""
        self._closed = True
        self._orders.put(None)
        self._process.close()
        self._thread.join()

    def _run(self) -> None:
        with suppress(GraftError):  # started while the first guide is being tried; what fails is told to who asks
            self._process.ensure_started()
        while (orders := self._orders.get()) is not None:
            left: list[Job] = []
            asked: list[int] = []
            for order in orders:
                self._note(order, asked, left)
            self._answer(asked, left)

    def _note(self, order: Order, asked: list[int], left: list[Job]) -> None:
        match order:
            case Follow(guide_id=guide_id, spec=spec):
                self._live[guide_id] = _Live(spec, [])
                asked.append(guide_id)
            case Accept(guide_id=guide_id, token_id=token_id):
                if guide_id in self._live:
                    self._live[guide_id].token_ids.append(token_id)
                    asked.append(guide_id)
            case Leave(guide_id=guide_id):
                if self._live.pop(guide_id, None) is not None:
                    left.append(CloseGuide(guide_id))

    def _answer(self, asked: list[int], left: list[Job]) -> None:
        """Answer for each asked guide; the one that a process was at when it ended may be to blame for that."""
        suspect = None
        while asked or left:
            try:
                self._process.ensure_started()
                jobs = left + [self._job(guide_id) for guide_id in asked]
                left = []
                for answer in self._process.ask(jobs):
                    self._tell(self._mask(asked.pop(0), answer))
            except ProcessEnded as end:
                if self._closed or not asked:
                    return
                if end.is_timeout or suspect == asked[0]:
                    self._blame(asked.pop(0), str(end))
                else:
                    suspect = asked[0]
            except GraftError as error:
                while asked and not self._closed:
                    self._tell(Mask(asked.pop(0), error=error))
                return

    def _blame(self, guide_id: int, message: str) -> None:
        spec = self._live.pop(guide_id).spec
        verdict = Verdict(spec, _invalid(spec, "GUIDE_TOO_COMPLEX", message))
        self._tell(Mask(guide_id, error=_exhausted(spec, message), verdict=verdict))

    def _job(self, guide_id: int) -> Job:
        """Advance a guide that this very process follows; open any other with all of its tokens."""
        live = self._live[guide_id]
        if live.start == self._process.num_starts:
            return AdvanceGuide(guide_id, live.token_ids[-1])
        live.start = self._process.num_starts
        return OpenGuide(guide_id, live.spec.kind.value, live.spec.source, live.token_ids)

    def _mask(self, guide_id: int, answer: Answer) -> Mask:
        if isinstance(answer, Allowed):
            return Mask(guide_id, answer.bits)
        spec = self._live[guide_id].spec
        if answer.reason == "GUIDE_TOO_COMPLEX":
            return Mask(guide_id, error=_exhausted(spec, answer.message))
        return Mask(guide_id, error=_invalid(spec, answer.reason, answer.message))


@dataclass
class _Live:
    """A followed sequence: its generated tokens, and the start of the process that follows it (0: none yet)."""

    spec: GuideSpec
    token_ids: list[int]
    start: int = 0


def field_of(spec: GuideSpec) -> str:
    """The request field that a guide came in."""
    return f"params.decoding.{spec.kind.value}"


def _invalid(spec: GuideSpec, reason: str, message: str) -> GraftError:
    verb = "is too complex" if reason == "GUIDE_TOO_COMPLEX" else "cannot be followed"
    return InvalidRequest(f"the {_NOUNS[spec.kind]} {verb}: {message}", reason=reason, field=field_of(spec))


def _exhausted(spec: GuideSpec, message: str) -> GraftError:
    text = f"the {_NOUNS[spec.kind]} was too complex to be followed to its end: {message}"
    return Exhausted(text, reason="GUIDE_TOO_COMPLEX", field=field_of(spec))


def _start(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
