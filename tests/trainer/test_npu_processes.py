"""How a training run's processes take their NPUs and join over HCCL, on a device module that only takes notes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# torch_npu gives the private device of torch its name and registers its functions; so does this.
TORCH_NPU = """
import types, torch
notes = []
npu = types.ModuleType("npu")
npu.is_available = lambda: True
npu.is_initialized = lambda: False
npu.device_count = lambda: 2
npu.set_device = lambda device: notes.append(f"set_device {device}")
npu.max_memory_allocated = lambda device: {"npu:1": 123}[str(device)]
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
"""
STARTS = """
import json, sys, types
import torch.distributed as dist
from runtime.distributed.mesh import MetByAll
from runtime.ops.platform import memory_peak_bytes
from runtime.trainer import __main__ as trainer
from runtime.trainer.config import ParallelConfig

class Training:
    def __init__(self, config, mesh, device, resume, *, overwrite):
        import torch_npu
        torch_npu.notes.append(f"trains on {device}, peak {memory_peak_bytes(device)}")
    def run(self):
        pass

def init_process_group(backend, rank, world_size, timeout):
    import torch_npu
    torch_npu.notes.append(f"init {backend} {rank} of {world_size}")

dist.init_process_group = init_process_group
trainer.Training = Training
trainer.make_mesh = lambda shape, rank: None
rank = int(sys.argv[1])
config = types.SimpleNamespace(parallel=ParallelConfig(dp=int(sys.argv[2])), device="npu")
told = None
try:
    trainer._train(config, None, rank, config.parallel.dp, rank)
except MetByAll as error:
    told = str(error)
import torch_npu
print(json.dumps({"notes": torch_npu.notes, "told": told}))
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    (tmp_path / "torch_npu.py").write_text(TORCH_NPU, encoding="utf-8")
    return tmp_path


def _start(folder: Path, rank: int, num_processes: int) -> Any:
    environment = os.environ | {
        "PYTHONPATH": f"{folder}:{ROOT}", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "LOCAL_WORLD_SIZE": str(num_processes),
    }  # fmt: skip
    command = [sys.executable, "-c", STARTS, str(rank), str(num_processes)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_takes_the_npu_of_its_local_rank_before_it_joins_the_others(fake: Path) -> None:
    found = _start(fake, rank=1, num_processes=2)
    assert found["notes"] == ["set_device npu:1", "init cpu:gloo,npu:hccl 1 of 2", "trains on npu:1, peak 123"]
    assert found["told"] is None


@pytest.mark.parametrize("rank", [0, 2])
def test_more_processes_than_npus_are_told_in_a_sentence_before_anything_is_joined(fake: Path, rank: int) -> None:
    """All processes of the host raise it, so that none waits for the one that has no device."""
    found = _start(fake, rank, num_processes=3)
    assert found["notes"] == []
    assert found["told"].startswith("3 processes were started on this host, which has 2 of device = 'npu'")
