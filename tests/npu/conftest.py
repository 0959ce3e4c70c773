"""The bench's kernels are in place before any test of this folder is imported."""

from __future__ import annotations

from tests.npu import bench

bench.install()
