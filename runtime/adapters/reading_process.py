"""The engine's end of its reading process, which is started with the engine, and again when it has been lost."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from runtime.adapters.folder_reader import FolderReader, FolderRules, ReadAdapter, ReadsFolders
from runtime.adapters.lent_pages import LentPages
from runtime.adapters.reading_protocol import (
    FolderRead,
    FolderRefused,
    Message,
    ReadFolder,
    ReadingSetup,
    Vacated,
    as_read_adapter,
    receive,
    send,
)
from runtime.adapters.shared_pages import why_not_shared
from runtime.env import child_environment, reading_niceness
from runtime.errors import Internal, Unavailable

START_SECONDS = 60.0
NICENESS = 10
_RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


def folders_reader(rules: FolderRules, *, own_process: bool, steps_need_cores: bool = False) -> ReadsFolders:
    """A reader with a process of its own, as servers have it, or one that reads in the thread that asks.

    The process has the cores that nobody wants if steps need them too; these leave them to it at times.
    """
    reason = why_not_shared()
    if own_process and reason:
        logger.warning("adapters are read in a thread of the engine's process: %s", reason)
    if not own_process or reason:
        return FolderReader(rules)
    return ReadingProcess(rules, None if steps_need_cores else NICENESS)


class ReadingProcess:
    """Belongs to one thread, but for `interrupt`. One folder is read at a time."""

    def __init__(self, rules: FolderRules, niceness: int | None = NICENESS) -> None:
        """`niceness`: see `runtime.env.reading_niceness`, which it is the default of."""
        self._rules = rules
        self._niceness = reading_niceness(niceness)
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._lent: LentPages | None = None
        self._sending = threading.Lock()
        self._is_ready = False
        self._closing = threading.Event()

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start the process and do not wait for it; what goes wrong is told when a folder is to be read."""
        if self._closing.is_set() or self._child is not None:
            return
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "runtime.adapters.reading_worker", str(theirs.fileno()), str(os.getpid())]
        self._connection = ours
        try:
            with theirs:
                self._child = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=child_environment()
                )
            send(ours, ReadingSetup.of(self._rules, self._niceness))
            self._lent = LentPages(partial(self._give_back, ours))
        except OSError as error:
            logger.error("the process that reads adapters did not start: %s", error)
        if self._closing.is_set():
            self.interrupt()

    def read(self, name: str, path: str, digest: str) -> ReadAdapter:
        """Have a folder read; raises what the reading ended with, and Unavailable if the process has ended."""
        if self._child is not None and self._child.poll() is not None:
            logger.warning("the process that reads adapters had ended (%s): a new one is started", self._reap())
        try:
            connection = self._started()
            with self._sending:
                send(connection, ReadFolder(name, path, digest))
            answer, fd = receive(connection)
            return self._taken(name, answer, fd)
        except (EOFError, OSError) as error:  # also where its memory cannot be mapped, which it would keep
            raise self._lost(name) from error

    def interrupt(self) -> None:
        """From any thread: end the process; who waits for it gets Unavailable, and no other is started."""
        self._closing.set()
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End the process and forget it."""
        self.interrupt()
        self._reap()

    def _started(self) -> socket.socket:
        """The connection to a process that has said that it is ready; raises OSError or EOFError."""
        self.start()
        connection = self._connection
        if connection is None:
            raise EOFError
        if not self._is_ready:
            connection.settimeout(START_SECONDS)
            receive(connection)
            connection.settimeout(None)
            self._is_ready = True
        return connection

    def _give_back(self, connection: socket.socket, segments: Sequence[int]) -> None:
        """Called by a thread of LentPages."""
        with self._sending, suppress(OSError):  # a process that has ended takes nothing back
            send(connection, Vacated(list(segments)))

    def _taken(self, name: str, answer: Message, fd: int | None) -> ReadAdapter:
        if isinstance(answer, FolderRead) and self._lent is not None:
            memory = self._lent.take(answer.segment, fd)
            self._lent.forget(answer.dropped)
            return as_read_adapter(answer, memory, self._rules)
        if isinstance(answer, FolderRefused):
            raise answer.error()
        raise Internal(f"adapter {name!r} could not be read", reason="ADAPTER_LOAD_FAILED")

    def _lost(self, name: str) -> Unavailable:
        status = self._reap()
        if self._closing.is_set():
            return Unavailable("the engine is shutting down", reason="SHUTTING_DOWN")
        logger.error("the process that reads adapters ended (%s) while it read %r", status, name)
        message = f"adapter {name!r} was not loaded: the process that reads adapters ended ({status}); load it again"
        return Unavailable(message, reason="ADAPTER_READER_LOST", retry_seconds=_RETRY_SECONDS)

    def _reap(self) -> str:
        """Forget the process, which has ended or is of no more use; returns how it ended."""
        child, connection, lent = self._child, self._connection, self._lent
        self._child = self._connection = self._lent = None
        self._is_ready = False
        if connection is not None:
            connection.close()
        if lent is not None:
            lent.close()
        if child is None:
            return "it did not start"
        child.kill()
        status = child.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
