"""One safetensors file: a checked header, and tensors read (not mapped) into buffers of their own.

Mapping a file makes every touched page count as resident memory until it is unmapped; plain reads keep the peak at the
tensors the caller holds. Format: 8 bytes little-endian header length, a JSON header, then the data without holes
(https://huggingface.co/docs/safetensors).
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from loaders.errors import LoadError
from loaders.json_file import parse_json_object

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_READ_BYTES = 1 << 26
_MAX_NAME_LENGTH = 512
_MAX_REMEMBERED_BYTES = 2**20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file; `dtype` is None for a storage type this package does not read."""

    name: str
    dtype_name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """An open safetensors file; `tensors` lists its tensors in file order. Close it, or use it in `with`."""

    def __init__(
        self, fd: int, label: str, *, error: type[LoadError] = LoadError, max_header_bytes: int = MAX_HEADER_BYTES
    ) -> None:
        """Take ownership of the descriptor `fd` and parse the header; raises `error` naming `label`."""
        self.label = label
        self._fd = fd
        self._error = error
        try:
            self.num_bytes = os.fstat(fd).st_size
            self.header_bytes = self._read_header(max_header_bytes)
            parse = _remembered if len(self.header_bytes) <= _MAX_REMEMBERED_BYTES else _parse_header
            self.metadata, self.tensors = parse(self.header_bytes, self.num_bytes, label, error)  # type: ignore[arg-type]
        except BaseException:
            os.close(fd)
            raise
        self.by_name = {tensor.name: tensor for tensor in self.tensors}

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(
        self,
        tensor: StoredTensor,
        observe: Callable[[memoryview], object] | None = None,
        scratch: bytearray | None = None,
    ) -> torch.Tensor:
        """The tensor on CPU in its stored dtype; `observe` sees the raw bytes first.

        It owns its memory, unless `scratch` (at least as large) is given: then it is valid until that is used again.
        """
        if tensor.dtype is None:
            raise self._error(f"{self.label}: {tensor.name} has the unknown dtype {tensor.dtype_name}")
        if tensor.num_bytes == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        buffer = bytearray(tensor.num_bytes) if scratch is None else scratch
        view = memoryview(buffer)[: tensor.num_bytes]
        self._read_into(view, tensor.offset)
        if observe is not None:
            observe(view)
        return torch.frombuffer(buffer, dtype=tensor.dtype, count=math.prod(tensor.shape)).view(tensor.shape)

    def read_bytes(self, offset: int, num_bytes: int, observe: Callable[[memoryview], object]) -> torch.Tensor:
        """A piece of the file as bytes, in memory of its own; `observe` sees it first."""
        raw = torch.empty(num_bytes, dtype=torch.uint8)
        view: memoryview = memoryview(raw.numpy().data)
        self._read_into(view, offset)
        observe(view)
        return raw

    def observe(self, offset: int, num_bytes: int, observe: Callable[[memoryview], object]) -> None:
        """Pass a piece of the file to `observe` in bounded parts, whose memory is used again."""
        buffer = bytearray(min(num_bytes, _READ_BYTES))
        for start in range(0, num_bytes, _READ_BYTES):
            view = memoryview(buffer)[: min(_READ_BYTES, num_bytes - start)]
            self._read_into(view, offset + start)
            observe(view)

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            num_read = os.preadv(self._fd, [view[done : done + _READ_BYTES]], offset + done)
            if num_read == 0:
                raise self._error(f"{self.label}: became shorter while it was read")
            done += num_read

    def _read_header(self, max_header_bytes: int) -> bytes:
        prefix = os.pread(self._fd, 8, 0)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise self._error(f"{self.label}: a Git LFS pointer, not the file itself (run `git lfs pull`)")
        if length > max_header_bytes:
            raise self._error(f"{self.label}: header of {length} bytes, at most {max_header_bytes} are allowed")
        if len(prefix) < 8 or length < 2 or 8 + length > self.num_bytes:
            raise self._error(f"{self.label}: {self.num_bytes} bytes, too short for its header (truncated download?)")
        header = bytearray(length)
        self._read_into(memoryview(header), 8)
        return prefix + bytes(header)


def _parse_header(
    header_bytes: bytes, num_bytes: int, label: str, error: type[LoadError]
) -> tuple[Mapping[str, Any], tuple[StoredTensor, ...]]:
    """Metadata, and the tensors in file order, of a file of `num_bytes` bytes."""
    header = parse_json_object(header_bytes[8:], f"{label}: header", error)
    metadata = header.pop("__metadata__", None)
    data_start = len(header_bytes)
    tensors = [_parse_entry(name, entry, data_start, label, error) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise error(f"{label}: data of {tensor.name} overlaps another tensor or leaves a hole")
        position += tensor.num_bytes
    if position > num_bytes:
        raise error(f"{label}: {num_bytes} bytes on disk, the header asks for {position} (truncated download?)")
    if position < num_bytes:
        raise error(f"{label}: {num_bytes - position} bytes after the last tensor")
    return metadata if isinstance(metadata, dict) else {}, tuple(tensors)


# Adapters that were trained alike have the same header.
_remembered = lru_cache(maxsize=4)(_parse_header)


def _parse_entry(name: str, entry: Any, data_start: int, label: str, error: type[LoadError]) -> StoredTensor:
    if not name.isprintable() or len(name) > _MAX_NAME_LENGTH:  # names end up in messages and logs
        raise error(f"{label}: header entry {name[:80]!r} is not a usable tensor name")
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise error(f"{label}: header entry {name} lacks dtype, shape or data_offsets") from None
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype_name, str) or not all(type(n) is int and n >= 0 for n in numbers) or end < begin:
        raise error(f"{label}: header entry {name} is malformed")
    dtype = DTYPES.get(dtype_name)
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise error(
            f"{label}: {name} is {dtype_name} {shape} but has {end - begin} bytes, not "
            f"{math.prod(shape) * dtype.itemsize}"
        )
    return StoredTensor(name, dtype_name, dtype, tuple(shape), data_start + begin, end - begin)
