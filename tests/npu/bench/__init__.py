"""Strict CPU kernels under the real operator names of torch_npu: `install()` once, then call `torch_npu` as on a device.

They check every documented limit, raise `BenchError` where the device would fail, and fill with NaN what it leaves
uninitialised. Where two documents differ, the stricter reading counts. Numerical types are the device's; products are
summed in float32.
"""

from __future__ import annotations

from tests.npu.bench.limits import BenchError, on_host
from tests.npu.bench.registry import KERNELS, calls

__all__ = ["KERNELS", "BenchError", "calls", "install", "on_host"]


def install() -> None:
    """Register all kernels with torch's dispatcher; a second call does nothing."""
    import torch_npu  # noqa: F401  # its import defines the operators

    from tests.npu.bench import (  # noqa: F401  # each enters its kernels
        attention,
        grouped_matmul,
        merging,
        norms,
        rope_cache,
        routing,
        training_attention,
    )
    from tests.npu.bench.registry import register_all

    register_all()
