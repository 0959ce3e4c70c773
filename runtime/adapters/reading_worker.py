"""The program of a reading process: `python -m runtime.adapters.reading_worker FD PARENT`.

Reading an adapter takes its process for itself many times, and cores of the machine; the engine's process has steps to
run meanwhile. What a file can break, memory or the process, it breaks here.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from runtime.adapters.folder_reader import FolderReader, FolderRules
from runtime.adapters.reading_protocol import (
    FolderRefused,
    ReadFolder,
    ReadingSetup,
    Ready,
    Vacated,
    as_message,
    receive,
    send,
)
from runtime.adapters.segments import MAX_READY_BYTES, SegmentStock
from runtime.adapters.shared_arena import SharedArena
from runtime.distributed.parent import end_with_parent
from runtime.env import configure_logging
from runtime.errors import GraftError

# Memory of one file is kept for the next one, since getting it from the system takes a third of a load's time; after so
# long without a file what is beyond a bound is given back.
IDLE_SECONDS = 30.0
# A segment is made ready for the next file when none has come for so long.
PREPARE_SECONDS = 0.2
_LEAST = 19
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 2**30
_MAX_MMAP_THRESHOLD_BYTES = 32 * 2**20  # glibc takes no more


logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Serve the engine until it closes the connection or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front-end alone decides about the end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(int(arguments[1]))
    configure_logging()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = socket.socket(fileno=int(arguments[0]))
    try:
        setup, _ = receive(connection)
        if not isinstance(setup, ReadingSetup):
            return 1
        _stand_back(setup.niceness)
        _keep_memory()
        send(connection, Ready())
        _serve(connection, setup.rules())
    except (EOFError, ConnectionError):
        return 0
    return 1


def _serve(connection: socket.socket, rules: FolderRules) -> None:
    gc.freeze()
    gc.disable()  # thousands of objects come and go with each file, none in a cycle
    stock = SegmentStock()
    own_bytes, last_read = _own_bytes(), time.monotonic()
    while True:
        job, _ = receive(connection)
        if isinstance(job, Vacated):
            stock.vacate(job.segments)
        elif isinstance(job, ReadFolder):
            _read(connection, rules, stock, job)
            gc.collect()
            last_read = time.monotonic()
        else:
            raise ConnectionError(f"a {type(job).__name__} is not for this process")
        _while_idle(connection, stock, own_bytes, last_read + IDLE_SECONDS)


def _while_idle(connection: socket.socket, stock: SegmentStock, own_bytes: int, idle_at: float) -> None:
    """Get ready for the next file, then give memory back; ends when the engine says something or all is done."""
    if _hears(connection, PREPARE_SECONDS):
        return
    with closing(stock.preparing()) as pieces:
        for _ in pieces:
            if _hears(connection, 0.0):
                return
    if not _hears(connection, max(0.0, idle_at - time.monotonic())):
        stock.shrink()
        if _own_bytes() - own_bytes > MAX_READY_BYTES:
            _give_memory_back()


def _hears(connection: socket.socket, timeout_seconds: float) -> bool:
    """Whether there is something to receive, or the other side is gone, within a time."""
    return bool(select.select([connection], [], [], timeout_seconds)[0])


def _read(connection: socket.socket, rules: FolderRules, stock: SegmentStock, job: ReadFolder) -> None:
    with SharedArena(stock) as arena:
        try:
            read = FolderReader(rules, arena.new_pages, arena.expect).read(job.name, job.path, job.digest)
        except GraftError as error:
            send(connection, FolderRefused.of(error))
        else:
            send(connection, *as_message(read, arena, stock.dropped))
            arena.lent()
            stock.dropped.clear()


def _own_bytes() -> int:
    """Memory of this process that no other one maps."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * resource.getpagesize()


def _stand_back(niceness: int | None) -> None:
    """Before there are threads, which inherit it."""
    if niceness is not None:
        os.nice(niceness)
        return
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError) as error:  # not on this system, or not allowed
        logger.warning("the process that reads adapters runs at nice %d: no idle scheduling (%s)", _LEAST, error)
        os.nice(_LEAST)


def _libc() -> ctypes.CDLL | None:
    """glibc, whose allocator can be told what to keep; other ones are left to their own ways."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _keep_memory() -> None:
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _give_memory_back() -> None:
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
