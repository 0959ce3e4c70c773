"""What a result must say about where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

_DTYPES = (torch.float32, torch.bfloat16)
_PRODUCT = (512, 1024, 1024)


def describe() -> dict[str, str | int]:
    """Machine, versions, date and threads of this process."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "product_gflops": ", ".join(
            f"{str(dtype).removeprefix('torch.')} {_product_gflops(dtype):.0f}" for dtype in _DTYPES
        ),
        "python": platform.python_version(),
        **versions,
    }


def _product_gflops(dtype: torch.dtype, repeats: int = 20) -> float:
    """The rate of one product of middling size: how much faster 16 bits are than 32 differs a lot among processors."""
    num_rows, num_in, num_out = _PRODUCT
    x, weight = torch.ones(num_rows, num_in, dtype=dtype), torch.ones(num_out, num_in, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * num_rows * num_in * num_out / best / 1e9


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
