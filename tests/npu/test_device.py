"""The real torch_npu without a device."""

from __future__ import annotations

import pytest
import torch

from runtime.ops.base import make_ops
from runtime.ops.npu.ops import NpuOps
from runtime.ops.platform import open_device


def test_a_machine_without_an_npu_is_told_so() -> None:
    with pytest.raises(ValueError, match="sees no NPU"):
        open_device("npu")


def test_the_npu_has_its_operation_table() -> None:
    assert type(make_ops(torch.device("npu"))) is NpuOps
