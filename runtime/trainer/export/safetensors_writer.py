"""One safetensors file, written tensor by tensor: memory holds the tensor being written, not the file.

Format: 8 bytes little-endian header length, a JSON header, then the data without holes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loaders.safetensors_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorHeader:
    """What the header of the file says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, headers: Sequence[TensorHeader], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> int:
    """Write a new file with `tensors` in the order of `headers`; returns its bytes.

    Wider dtypes must come first, so that every tensor stays aligned. Raises ValueError if tensors and headers disagree,
    OSError if writing fails (the file is then incomplete: the caller removes it).
    """
    widths = [header.dtype.itemsize for header in headers]
    if widths != sorted(widths, reverse=True):
        raise ValueError(f"{path}: tensors of wider dtypes must come first")
    prefix = _encode(headers, metadata)
    with path.open("xb") as file:
        file.write(prefix)
        for header, tensor in zip(headers, tensors, strict=True):
            if tensor.dtype != header.dtype or tuple(tensor.shape) != header.shape:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{path}: {header.name} is {found}, not {header.dtype} {list(header.shape)}")
            file.write(_raw_bytes(tensor))
    return len(prefix) + sum(header.num_bytes for header in headers)


def _encode(headers: Sequence[TensorHeader], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for header in headers:
        end = begin + header.num_bytes
        entries[header.name] = {
            "dtype": _NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
