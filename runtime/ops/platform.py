"""What differs between devices outside the operations: names, dtypes and memory. The only other place that asks."""

from __future__ import annotations

import torch

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def open_device(name: str) -> torch.device:
    """The torch device of a name; raises ValueError saying what is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': this PyTorch sees no CUDA device; use --device cpu")
    if name == "npu":
        raise ValueError("device = 'npu': the Ascend back-end is not part of this release; use --device cpu or cuda")
    return torch.device(name)


def resolve_dtype(name: str, stored: str | None) -> torch.dtype:
    """The compute dtype: as asked, or for "auto" the dtype that the checkpoint says it was stored in."""
    if name != "auto":
        return _DTYPES[name]
    return _DTYPES.get(stored or "", torch.bfloat16)
