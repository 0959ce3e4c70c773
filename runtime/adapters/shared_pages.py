"""Memory that two processes can map: made in one, read in the other, gone when neither maps it any more.

It is a file without a name (memfd), handed over as a descriptor, so it has neither a path nor the bounds of /dev/shm,
which is 64 MB in most containers.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import queue
import resource
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Of Linux's mman.h. Kernels before 5.14 refuse the second, and memory comes as it is written.
_MADV_REMOVE, _MADV_POPULATE_WRITE = 9, 23
_MAP_FAILED = ctypes.c_void_p(-1).value

Memory: TypeAlias = "ctypes.Array[ctypes.c_char]"


def why_not_shared() -> str:
    """Why this process's children cannot hand memory over; empty if they can."""
    if not hasattr(os, "memfd_create"):
        return "this system has no memfd_create"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY:
        return f"files, and memory that is handed over, may have {limit} bytes at most (ulimit -f)"
    return ""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in such memory."""

    shape: tuple[int, ...]
    offset: int


def new_memory_file() -> int:
    """A descriptor of memory without a name, of no bytes yet."""
    return os.memfd_create("graft-adapter", os.MFD_CLOEXEC)  # type: ignore[attr-defined,unused-ignore]


def map_memory(fd: int, num_bytes: int, offset: int = 0) -> Memory:
    """Map a part of a file, and unmap it when nothing holds what is returned any more. Raises OSError.

    The module mmap keeps a descriptor for each mapping, of which a process has 1,024. And unmapping an adapter takes as
    long as a layer's computation, so a thread does it, whoever drops the last tensor.
    """
    libc = _libc()
    address = libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"{num_bytes} bytes of shared memory cannot be mapped: {os.strerror(code)}")
    memory = (ctypes.c_char * num_bytes).from_address(address)
    weakref.finalize(memory, _unmapping().put, partial(libc.munmap, address, num_bytes)).atexit = False
    return memory


def lease(memory: Memory, on_end: Callable[[], None]) -> Memory:
    """The same memory, which lives as long; `on_end` is called when nothing holds what is returned any more.

    That may be in any thread, between any two of its instructions: `on_end` must take no lock.
    """
    own = (ctypes.c_char * len(memory)).from_address(ctypes.addressof(memory))
    weakref.finalize(own, _end_lease, memory, on_end).atexit = False
    return own


def _end_lease(_: Memory, on_end: Callable[[], None]) -> None:
    on_end()


def populate(memory: Memory, start: int, num_bytes: int) -> None:
    """Get a part of it from the system, which takes as long as reading it from a fast disk. `start` is a page's."""
    _libc().madvise(ctypes.addressof(memory) + start, min(num_bytes, len(memory) - start), _MADV_POPULATE_WRITE)


def discard(memory: Memory) -> None:
    """Give all of it back to the system at once, for every process that maps it: it reads as zeros from now on."""
    _libc().madvise(ctypes.addressof(memory), len(memory), _MADV_REMOVE)


def tensor_over(memory: Memory, shape: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    """A tensor over the memory; raises ValueError if it does not lie in it."""
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(*shape)


@lru_cache(maxsize=1)
def _unmapping() -> queue.SimpleQueue[Callable[[], Any]]:
    """What is put here is called by a thread; putting takes no lock that its own thread could hold."""
    calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()

    def run() -> None:
        while True:
            calls.get()()

    threading.Thread(target=run, name="adapter-memory", daemon=True).start()
    return calls


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
