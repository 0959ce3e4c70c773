"""What the engine says to a guide process and back: one frame of jobs, then one frame for each answer, in order."""

from __future__ import annotations

from dataclasses import dataclass, fields
from multiprocessing.connection import Connection

import msgpack

from runtime.engine.sampling_params import GuideKind, GuideSpec

MAX_FRAME_BYTES = 64 * 2**20


@dataclass(frozen=True)
class WorkerSetup:
    """What a guide process needs to know; times are seconds of the clock.

    A job that takes longer than its time, or a process that takes more memory, ends the process.
    """

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]
    cache_entries: int
    compile_seconds: float
    step_seconds: float
    max_memory_bytes: int
    niceness: int


@dataclass(frozen=True)
class CheckGuide:
    """Compile a guide and compute its first mask, to see whether it can be followed; nothing is kept."""

    kind: str
    source: str

    @property
    def spec(self) -> GuideSpec:
        """The guide."""
        return GuideSpec(GuideKind(self.kind), self.source)


@dataclass(frozen=True)
class OpenGuide:
    """Follow a guide for one sequence, which may have generated tokens already."""

    guide_id: int
    kind: str
    source: str
    token_ids: list[int]

    @property
    def spec(self) -> GuideSpec:
        """The guide."""
        return GuideSpec(GuideKind(self.kind), self.source)


@dataclass(frozen=True)
class AdvanceGuide:
    """The sequence has generated one more token."""

    guide_id: int
    token_id: int


@dataclass(frozen=True)
class CloseGuide:
    """The sequence has ended; this job alone has no answer."""

    guide_id: int


@dataclass(frozen=True)
class Allowed:
    """The tokens that may come next, one bit each, the lowest bit of a byte first; of a setup or a check: nothing."""

    bits: bytes = b""


@dataclass(frozen=True)
class Refused:
    """Why a guide cannot be followed (any further)."""

    reason: str
    message: str


Job = CheckGuide | OpenGuide | AdvanceGuide | CloseGuide
Answer = Allowed | Refused
_CLASSES = {cls.__name__: cls for cls in (WorkerSetup, CheckGuide, OpenGuide, AdvanceGuide, CloseGuide)}
_ANSWERS = {cls.__name__: cls for cls in (Allowed, Refused)}


def send_setup(connection: Connection, setup: WorkerSetup) -> None:
    """The engine's first words; the answer to them says whether the process can work."""
    connection.send_bytes(msgpack.packb(_flat(setup)))


def receive_setup(connection: Connection) -> WorkerSetup:
    """The process's end of `send_setup`; raises EOFError when the engine is gone."""
    name, *values = msgpack.unpackb(connection.recv_bytes(MAX_FRAME_BYTES))
    setup: WorkerSetup = _CLASSES[name](*values)  # type: ignore[assignment]
    return setup


def send_jobs(connection: Connection, jobs: list[Job]) -> None:
    """All jobs in one frame, so that neither side ever waits for the other to read; raises OSError."""
    connection.send_bytes(msgpack.packb([_flat(job) for job in jobs]))


def receive_jobs(connection: Connection) -> list[Job]:
    """The process's end of `send_jobs`; raises EOFError when the engine is gone."""
    frame = msgpack.unpackb(connection.recv_bytes(MAX_FRAME_BYTES))
    return [_CLASSES[name](*values) for name, *values in frame]  # type: ignore[misc]


def send_answer(connection: Connection, answer: Answer) -> None:
    """One answer; raises OSError."""
    connection.send_bytes(msgpack.packb(_flat(answer)))


def receive_answer(connection: Connection) -> Answer:
    """The next answer; raises EOFError or OSError when the process has ended."""
    name, *values = msgpack.unpackb(connection.recv_bytes(MAX_FRAME_BYTES))
    return _ANSWERS[name](*values)


def _flat(item: WorkerSetup | Job | Answer) -> list[object]:
    return [type(item).__name__, *(getattr(item, field.name) for field in fields(item))]
