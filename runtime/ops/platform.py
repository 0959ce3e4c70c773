"""What differs between devices outside the operations: names, dtypes and memory. The only other place that asks."""

from __future__ import annotations

import ctypes
import importlib
import resource
import sys

import torch

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def open_device(name: str) -> torch.device:
    """The torch device of a name; raises ValueError saying what is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': this PyTorch sees no CUDA device; use --device cpu")
    if name == "npu":
        _require_npu()
    return torch.device(name)


def _require_npu() -> None:
    """Import torch_npu, which makes the device known to torch; it happens here and for no other device."""
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        raise ValueError(
            f"device = 'npu': torch_npu cannot be imported ({error}); install graft-moe[npu] and CANN, and source "
            "CANN's set_env.sh in this shell, or use the container of deploy/docker/ascend.Dockerfile"
        ) from None
    if not getattr(torch, "npu").is_available():  # noqa: B009 - torch has it only now
        raise ValueError(
            "device = 'npu': torch_npu sees no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES, "
            "or use --device cpu"
        )


def resolve_dtype(name: str, stored: str | None) -> torch.dtype:
    """The compute dtype: as asked, or for "auto" the dtype that the checkpoint says it was stored in."""
    if name != "auto":
        return _DTYPES[name]
    return _DTYPES.get(stored or "", torch.bfloat16)


def collective_backend(device: torch.device) -> str:
    """torch.distributed's back-end for tensors of a device; host tensors always go through Gloo."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{'hccl' if device.type == 'npu' else 'nccl'}"


def bind_process(device: torch.device, local_rank: int) -> torch.device:
    """The device of one of several processes on a host: its own accelerator, or the CPU for all."""
    if device.type == "cpu":
        return device
    own = torch.device(device.type, local_rank)
    getattr(torch, device.type).set_device(own)
    return own


def memory_peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held on the device so far."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(getattr(torch, device.type).max_memory_allocated(device))


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep what it frees on the CPU: faulting large tensors in anew costs a tenth of a step.

    Works with glibc's allocator and changes nothing with others.
    """
    if device.type == "cpu" and sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
