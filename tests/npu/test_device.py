"""The real torch_npu without a device."""

from __future__ import annotations

import pytest
import torch
import torch_npu  # noqa: F401  # its import registers the device and HCCL
from torch.distributed.distributed_c10d import Backend, BackendConfig

from runtime.ops.base import make_ops
from runtime.ops.npu.ops import NpuOps
from runtime.ops.platform import collective_backend, open_device


def test_a_machine_without_an_npu_is_told_so() -> None:
    with pytest.raises(ValueError, match="sees no NPU"):
        open_device("npu")


def test_the_npu_has_its_operation_table() -> None:
    assert type(make_ops(torch.device("npu"))) is NpuOps


def test_torch_npu_brings_the_back_end_that_the_trainer_asks_for() -> None:
    backend = collective_backend(torch.device("npu", 0))
    assert backend == "cpu:gloo,npu:hccl"
    assert BackendConfig(Backend(backend)).get_device_backend_map() == {"cpu": "gloo", "npu": "hccl"}
