"""Pages in memory that two processes can map: made in one, read in the other, gone when the last tensor is.

The memory is a file without a name (memfd), handed over as a descriptor, so it has neither a path nor the bounds of
/dev/shm, which is 64 MB in most containers.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_ALIGNED_BYTES = 64
_MADV_POPULATE_WRITE = 23  # of Linux's mman.h, since 5.14; older kernels refuse it, and memory comes as it is written
_MAP_FAILED = ctypes.c_void_p(-1).value


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


class SharedArena:
    """Memory that grows with each tensor asked of it; `fd` is the descriptor to hand over. Use it in `with`."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("graft-adapter", os.MFD_CLOEXEC)  # type: ignore[attr-defined,unused-ignore]
        self._num_bytes = 0
        self._offsets: dict[int, int] = {}
        self._expected: ctypes.Array[ctypes.c_char] | None = None
        self._filling: Future[int] | None = None

    def __enter__(self) -> SharedArena:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def expect(self, num_bytes: int) -> None:
        """Begin to get about so much memory from the system, in a thread: that takes a third of a load's time."""
        if num_bytes and not self._num_bytes:
            os.ftruncate(self.fd, num_bytes)
            self._expected = _map(self.fd, num_bytes, 0)
            address = ctypes.addressof(self._expected)
            self._filling = _background().submit(_libc().madvise, address, num_bytes, _MADV_POPULATE_WRITE)

    def new_zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in this memory; raises OSError if there is no more."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            raise ValueError(f"a page cannot have the shape {shape}")
        offset = _round_up(self._num_bytes, _ALIGNED_BYTES)
        if self._expected is not None and offset + num_bytes <= len(self._expected):
            tensor = torch.frombuffer(self._expected, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
        else:
            offset = _round_up(max(offset, len(self._expected or ())), mmap.PAGESIZE)
            os.ftruncate(self.fd, offset + num_bytes)
            tensor = torch.frombuffer(_map(self.fd, num_bytes, offset), dtype=dtype).view(shape)
        self._num_bytes = offset + num_bytes
        self._offsets[tensor.data_ptr()] = offset
        return tensor

    def finish(self) -> None:
        """Give back what was expected and is not used; the memory can be handed over."""
        if self._filling is not None:
            self._filling.result()
        os.ftruncate(self.fd, self._num_bytes)

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor of `new_zeros` lies; one that lies elsewhere is copied here first."""
        if tensor.data_ptr() not in self._offsets:
            own = self.new_zeros(tuple(tensor.shape), tensor.dtype)
            own.copy_(tensor)
            tensor = own
        return Place(tuple(tensor.shape), self._offsets[tensor.data_ptr()])


class SharedMapping:
    """The memory of another process's arena; it is unmapped when this and the last tensor over it are gone."""

    def __init__(self, fd: int) -> None:
        """Map all of it and close the descriptor."""
        try:
            self._memory = _map(fd, os.fstat(fd).st_size or mmap.PAGESIZE, 0)
        finally:
            os.close(fd)

    def tensor(self, shape: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
        """A tensor over the memory; raises ValueError if it does not lie in it."""
        return torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=offset).view(*shape)


def _map(fd: int, num_bytes: int, offset: int) -> ctypes.Array[ctypes.c_char]:
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
    weakref.finalize(memory, _background().submit, libc.munmap, address, num_bytes).atexit = False
    return memory


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@lru_cache(maxsize=1)
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-memory")


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
