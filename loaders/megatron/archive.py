"""One rank's checkpoint file, torch.save's or safetensors': the named tensors of the model, read without unpickling."""

import math
import os
import stat
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loaders.errors import AdapterError
from loaders.megatron.pickle_reader import TensorRef, read_pickle
from loaders.safetensors_file import SafetensorsFile

_MAX_PICKLE_BYTES = 64 * 1024 * 1024
_LOCAL_HEADER_BYTES = 30
_DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16}


@dataclass(frozen=True)
class ShardTensor:
    """A tensor of a file: its shape, and how to read it; `dtype` is None for a type that factors do not have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], torch.Tensor]


class ShardFile:
    """An open file of one rank; `tensors` by name, headers only. Close it, or use it in `with`."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its names; raises AdapterError."""
        self.label = f"{path.parent.name}/{path.name}"
        self._stack = ExitStack()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as cause:
            raise AdapterError(f"{path}: cannot be opened ({cause.strerror}); files must be regular ones") from None
        self._stack.callback(os.close, self._fd)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{path}: not a regular file")
            self.num_bytes = status.st_size
            self.tensors = self._from_safetensors() if path.suffix == ".safetensors" else self._from_torch()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _from_safetensors(self) -> dict[str, ShardTensor]:
        file = self._stack.enter_context(SafetensorsFile(os.dup(self._fd), self.label, error=AdapterError))
        return {
            stored.name: ShardTensor(stored.shape, stored.dtype, lambda stored=stored: file.read(stored))  # type: ignore[misc]
            for stored in file.tensors
        }

    def _from_torch(self) -> dict[str, ShardTensor]:
        try:
            with os.fdopen(os.dup(self._fd), "rb") as file, zipfile.ZipFile(file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                root = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, OSError):
            root, entries = None, {}
        if root is None:
            raise AdapterError(f"{self.label}: not a file of torch.save (in its zip form) nor safetensors")
        order = entries.get(f"{root}byteorder")
        if order is not None and self._bytes_of(order, 16) != b"little":
            raise AdapterError(f"{self.label}: its numbers are not little-endian")
        data = read_pickle(self._bytes_of(entries[f"{root}data.pkl"], _MAX_PICKLE_BYTES), self.label)
        names = _model_of(data, self.label)
        num_bytes = sum(4 * math.prod(ref.shape) for name, ref in names.items() if "lora" in name)
        if num_bytes > 4 * self.num_bytes:  # tensors that lie on top of each other would take more than the file
            raise AdapterError(f"{self.label}: its factors ask for more numbers than the file can hold")
        return {
            name: ShardTensor(ref.shape, _DTYPES.get(ref.storage.kind), self._reader(ref, f"{root}data/", entries))
            for name, ref in names.items()
        }

    def _reader(
        self, ref: TensorRef, folder: str, entries: dict[str, zipfile.ZipInfo]
    ) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            entry, dtype = entries.get(folder + ref.storage.key), _DTYPES.get(ref.storage.kind)
            if entry is None or dtype is None:
                raise AdapterError(f"{self.label}: storage {ref.storage.key[:40]!r} is missing or of another type")
            if 0 in ref.shape:
                return torch.empty(ref.shape, dtype=dtype)
            steps = ((size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=True))
            span = (1 + sum(steps)) * dtype.itemsize
            if math.prod(ref.shape) * dtype.itemsize > span:
                raise AdapterError(f"{self.label}: a tensor whose elements overlap")
            data = bytearray(self._bytes_of(entry, span, ref.offset * dtype.itemsize, exact=True))
            return torch.frombuffer(data, dtype=dtype).as_strided(ref.shape, ref.stride).contiguous()

        return read

    def _bytes_of(self, entry: zipfile.ZipInfo, max_bytes: int, start: int = 0, *, exact: bool = False) -> bytes:
        """At most (or exactly) `max_bytes` of an entry from `start` on, read where it lies: torch never compresses."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise AdapterError(f"{self.label}: {entry.filename[:80]!r} is compressed, which torch.save never does")
        size = max_bytes if exact else entry.file_size
        if size > max_bytes or start + size > entry.file_size:
            raise AdapterError(f"{self.label}: {entry.filename[:80]!r} has {entry.file_size} bytes: too many or few")
        if not 0 <= entry.header_offset <= self.num_bytes - _LOCAL_HEADER_BYTES:
            raise AdapterError(f"{self.label}: truncated, or its directory is broken")
        header = os.pread(self._fd, _LOCAL_HEADER_BYTES, entry.header_offset)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        position = entry.header_offset + _LOCAL_HEADER_BYTES + names + start
        if position + size > self.num_bytes:
            raise AdapterError(f"{self.label}: truncated")
        pieces = []
        while size > 0:
            piece = os.pread(self._fd, min(size, 1 << 26), position)
            if not piece:
                raise AdapterError(f"{self.label}: became shorter while it was read")
            pieces.append(piece)
            position, size = position + len(piece), size - len(piece)
        return b"".join(pieces)


def _model_of(data: Any, label: str) -> dict[str, TensorRef]:
    """The tensors by name in `model` of a Megatron checkpoint, or of a plain state dict."""
    if isinstance(data, dict) and "model0" in data:
        raise AdapterError(f"{label}: virtual pipeline stages (model0, model1, ...) are not supported; save without")
    model = data.get("model", data) if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise AdapterError(f"{label}: has no dictionary `model` of tensors")
    return {
        name: ref
        for name, ref in model.items()
        if isinstance(ref, TensorRef) and isinstance(name, str) and name.isprintable() and len(name) <= 512
    }
