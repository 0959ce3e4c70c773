"""The engine as a process of its own: `python -m runtime.engine.process FD MODULE:CLASS`, started by the front-end."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from loaders.progress import progress_bar
from runtime.config import EngineConfig
from runtime.engine.messages import (
    Command,
    EngineFailed,
    EngineReady,
    EngineStats,
    Event,
    Shutdown,
    StepOutputs,
)
from runtime.engine.transport import Connection, TransportError
from runtime.env import configure_logging
from runtime.errors import GraftError

IDLE_SECONDS = 0.2
DEFAULT_ENGINE = "runtime.engine.engine:Engine"

logger = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What this process needs of an engine."""

    @property
    def ready(self) -> EngineReady: ...
    def submit(self, command: Command) -> None: ...
    def step(self) -> list[Event]: ...
    def has_work(self) -> bool: ...
    def wait_for_work(self, timeout_seconds: float) -> bool: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


EngineClass = Callable[[EngineConfig, Callable[[int, int], None]], EngineLike]


class EngineProcess:
    """Moves commands from the socket to the engine and events from the engine to the socket."""

    def __init__(self, connection: Connection, engine_class: EngineClass) -> None:
        self._connection = connection
        self._engine_class = engine_class
        self._engine: EngineLike | None = None
        self._stopping = threading.Event()
        self._last_stats = EngineStats()

    def run(self) -> int:
        """Serve until the front-end says so or goes away; returns the exit status."""
        config = self._connection.receive()
        if not isinstance(config, EngineConfig):
            return 1
        reader = threading.Thread(target=self._read_commands, name="engine-inbox", daemon=True)
        reader.start()
        try:
            engine = self._start(config)
            if engine is None:
                return 1
            self._connection.send(engine.ready)
            self._step_until_stopped(engine)
        except (BrokenPipeError, ConnectionError):
            logger.info("the front-end is gone")
        except Exception as error:
            logger.exception("the engine failed")
            self._connection.send(EngineFailed(f"{type(error).__name__}: {error}"))
            return 1
        finally:
            if self._engine is not None:
                self._engine.close()
        return 0

    def _start(self, config: EngineConfig) -> EngineLike | None:
        """The engine, or None after telling what the user can mend (a wrong folder, a file, too little memory)."""
        try:
            with progress_bar("loading the base") as progress:
                self._engine = self._engine_class(config, progress)
                gc.freeze()  # what is there now stays: to look through it again and again holds up steps by 50 ms
        except (GraftError, ValueError, OSError) as error:
            logger.debug("the engine did not start", exc_info=True)
            self._connection.send(EngineFailed(str(error)))
        return self._engine

    def _step_until_stopped(self, engine: EngineLike) -> None:
        while not self._stopping.is_set():
            if not engine.has_work():
                engine.wait_for_work(IDLE_SECONDS)
                if self._stopping.is_set():
                    return
            self._send_events(engine.step(), engine)

    def _send_events(self, events: list[Event], engine: EngineLike) -> None:
        """A step without outputs may still have freed something: then the stats alone are news."""
        for event in events:
            self._connection.send(event)
        if outputs := [event for event in events if isinstance(event, StepOutputs)]:
            self._last_stats = replace(outputs[-1].stats, iteration_tokens=0)
        elif (stats := engine.stats()) != self._last_stats:
            self._last_stats = stats
            self._connection.send(StepOutputs([], stats))

    def _read_commands(self) -> None:
        """Runs in a thread: the socket to the engine's inbox, until the socket closes."""
        try:
            while not isinstance(command := self._connection.receive(), Shutdown | None):
                self._engine.submit(command)  # type: ignore[union-attr,arg-type]
        except (TransportError, OSError):
            logger.exception("the connection to the front-end broke")
        finally:
            self._stopping.set()
            if self._engine is None:
                os._exit(1)  # the front-end died while the base was being loaded: free the memory at once


def load_engine_class(name: str) -> EngineClass:
    """`module:Class` -> the class."""
    module, _, attribute = name.partition(":")
    engine_class: EngineClass = getattr(importlib.import_module(module), attribute)
    return engine_class


def main(arguments: Sequence[str]) -> int:
    """Take over the inherited socket and run. The front-end alone decides about the end, so signals are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging()
    connection = Connection(socket.socket(fileno=int(arguments[0])))
    status = EngineProcess(connection, load_engine_class(arguments[1])).run()
    sys.stderr.flush()
    os._exit(status)  # threads of the device libraries must not hold up the end


if __name__ == "__main__":
    main(sys.argv[1:])
