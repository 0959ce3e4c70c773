"""Strict CPU kernels under the real operator names of torch_npu: `install()` once, then call it as on a device.

They check every documented limit, raise `BenchError` where the device would fail, and fill with NaN what it leaves
uninitialised. Where two documents differ, the stricter reading counts. Numerical types are the device's; products are
summed in float32. `KERNELS` holds the kernels by operator, `calls` counts their runs, `record()` lists them one by one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.npu.bench.limits import BenchError, on_host
    from tests.npu.bench.recording import Launch, record
    from tests.npu.bench.registry import KERNELS, calls

__all__ = ["KERNELS", "BenchError", "Launch", "calls", "install", "on_host", "record"]

# Imported when first asked for: `stubs`, beside them, must run where importing torch still fails for want of CANN.
_HOMES = {"BenchError": "limits", "on_host": "limits", "KERNELS": "registry", "calls": "registry",
          "Launch": "recording", "record": "recording"}
_FAMILIES = (
    "attention", "formats", "grouped_matmul", "merging", "norms", "prolog", "rope_cache", "routing",
    "training_attention",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def install() -> None:
    """Register all kernels with torch's dispatcher; a second call does nothing."""
    import torch_npu  # noqa: F401  # its import defines the operators

    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    importlib.import_module(f"{__name__}.registry").register_all()
