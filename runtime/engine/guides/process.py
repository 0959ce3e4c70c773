"""The engine's end of a guide process: it is started when it is needed, and again after it had to be ended."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

from runtime.engine.guides.protocol import (
    Answer,
    CloseGuide,
    Job,
    Refused,
    WorkerSetup,
    receive_answer,
    send_jobs,
    send_setup,
)
from runtime.env import child_environment
from runtime.errors import GraftError, Precondition, Unavailable

START_SECONDS = 60.0
_RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class ProcessEnded(Exception):
    """The process ended before its next answer; the text says of what, `is_timeout` whether by its own clock."""

    def __init__(self, message: str, *, is_timeout: bool) -> None:
        super().__init__(message)
        self.is_timeout = is_timeout


class GuideProcess:
    """Belongs to one thread, but for `close`. `num_starts` tells a process from the ones before it."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.num_starts = 0
        self._setup = setup
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._refusal: GraftError | None = None
        self._closed = False

    def ensure_started(self) -> None:
        """Raises Precondition if the model cannot have guides, Unavailable if the process does not come up."""
        if self._refusal is not None:
            raise self._refusal
        if self._closed:
            raise Unavailable("the engine is shutting down", reason="SHUTTING_DOWN")
        if self._child is not None and self._child.poll() is not None:
            self._reap()
        if self._connection is None:
            self._start()

    def ask(self, jobs: list[Job]) -> Iterator[Answer]:
        """The answers, as they come; raises ProcessEnded where the next one will not come any more."""
        connection = self._connection
        try:
            if connection is None:
                raise EOFError
            send_jobs(connection, jobs)
            for job in jobs:
                if not isinstance(job, CloseGuide):
                    yield receive_answer(connection)
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def close(self) -> None:
        """From any thread: end the process; whoever waits for an answer gets ProcessEnded."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()

    def _start(self) -> None:
        try:
            connection = self._spawn()
            self._connection = connection
            self.num_starts += 1
            send_setup(connection, self._setup)
            if not connection.poll(START_SECONDS):
                raise TimeoutError(f"it has not come up in {START_SECONDS:.0f} s")
            answer = receive_answer(connection)
        except (EOFError, OSError) as error:
            if self._child is not None:
                self._child.kill()
            logger.error("a guide process did not start (status %s): %s", self._reap(), error)
            message = "guided decoding is not available at the moment; the server's log says why"
            raise Unavailable(message, reason="GUIDES_UNAVAILABLE", retry_seconds=_RETRY_SECONDS) from error
        if isinstance(answer, Refused):
            self._reap()
            self._refusal = Precondition(answer.message, reason=answer.reason)
            raise self._refusal

    def _spawn(self) -> Connection:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "runtime.engine.guides.worker", str(theirs.fileno())]
        with ours, theirs:
            self._child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=child_environment()
            )
            if self._closed:
                self._child.kill()
            return Connection(ours.detach())

    def _ended(self) -> ProcessEnded:
        status = self._reap()
        if status == -signal.SIGALRM:
            return ProcessEnded("it takes too long", is_timeout=True)
        logger.warning("a guide process ended with status %s", status)
        return ProcessEnded("it takes too much memory, or breaks the library that follows it", is_timeout=False)

    def _reap(self) -> int | None:
        """Forget an ended process; returns its status, None if there was none."""
        child, connection = self._child, self._connection
        self._child = self._connection = None
        if connection is not None:
            connection.close()
        return None if child is None else child.wait()
