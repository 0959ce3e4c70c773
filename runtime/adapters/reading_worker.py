"""The program of a reading process: `python -m runtime.adapters.reading_worker FD PARENT`.

Reading an adapter takes its process for itself many times, and cores of the machine; the engine's process has steps to
run meanwhile. What a file can break, memory or the process, it breaks here.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence

import torch

from runtime.adapters.folder_reader import FolderReader, FolderRules
from runtime.adapters.reading_protocol import (
    FolderRefused,
    ReadFolder,
    ReadingSetup,
    Ready,
    as_message,
    receive,
    send,
)
from runtime.adapters.shared_pages import SharedArena
from runtime.distributed.parent import end_with_parent
from runtime.env import configure_logging
from runtime.errors import GraftError

# Memory of one file is kept for the next one, since getting it from the system takes a third of a load's time; after so
# long without a file it is given back.
IDLE_SECONDS = 2.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 2**30
_MAX_MMAP_THRESHOLD_BYTES = 32 * 2**20  # glibc takes no more


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
        os.nice(setup.niceness)
        _keep_memory()
        send(connection, Ready())
        _serve(connection, setup.rules())
    except (EOFError, ConnectionError):
        return 0
    return 1


def _serve(connection: socket.socket, rules: FolderRules) -> None:
    gc.freeze()
    gc.disable()  # thousands of objects come and go with each file, none in a cycle
    while True:
        try:
            connection.settimeout(IDLE_SECONDS)
            job, _ = receive(connection)
        except TimeoutError:
            _give_memory_back()
            connection.settimeout(None)
            job, _ = receive(connection)
        connection.settimeout(None)
        if not isinstance(job, ReadFolder):
            raise ConnectionError(f"a {type(job).__name__} is not for this process")
        _read(connection, rules, job)
        gc.collect()


def _read(connection: socket.socket, rules: FolderRules, job: ReadFolder) -> None:
    with SharedArena() as arena:
        try:
            read = FolderReader(rules, arena.new_zeros, arena.expect).read(job.name, job.path, job.digest)
        except GraftError as error:
            send(connection, FolderRefused.of(error))
        else:
            message = as_message(read, arena)
            arena.finish()
            send(connection, message, arena.fd)


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
