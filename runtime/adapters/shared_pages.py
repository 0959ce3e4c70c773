"""Pages in memory that two processes can map: made in one, read in the other, gone when the last tensor is.

The memory is a file without a name (memfd), handed over as a descriptor, so it has neither a path nor the bounds of
/dev/shm, which is 64 MB in most containers.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_MAP_FAILED = ctypes.c_void_p(-1).value
IS_SUPPORTED = hasattr(os, "memfd_create")


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

    def __enter__(self) -> SharedArena:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def new_zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in this memory; raises OSError if there is no more."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            raise ValueError(f"a page cannot have the shape {shape}")
        offset = self._num_bytes
        self._num_bytes += -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self.fd, self._num_bytes)
        tensor = torch.frombuffer(_map(self.fd, num_bytes, offset), dtype=dtype).view(shape)
        self._offsets[tensor.data_ptr()] = offset
        return tensor

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor of `new_zeros` lies."""
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
    weakref.finalize(memory, _unmapping().submit, libc.munmap, address, num_bytes).atexit = False
    return memory


@lru_cache(maxsize=1)
def _unmapping() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-unmapping")


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
