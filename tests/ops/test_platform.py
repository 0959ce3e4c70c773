"""Opening a device: what is missing is named, and no device library is imported for another device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USES_CPU = """
import sys, torch
from runtime import cli
from runtime.engine import engine
from runtime.ops.base import make_ops
from runtime.ops.platform import bind_process, open_device
from runtime.trainer import loop
device = bind_process(open_device("cpu"), 0)
make_ops(device)
make_ops(torch.device("cuda"))
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch_npu" or name.startswith("runtime.ops.npu")))
"""
OPENS_NPU = """
from runtime.ops.platform import open_device
try:
    open_device("npu")
except ValueError as error:
    print(error)
"""


def _output_of(program: str, folder: Path, torch_npu: str | None) -> str:
    """With a package of that name beside it, if one is given."""
    if torch_npu is not None:
        (folder / "torch_npu.py").write_text(torch_npu, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_npu_is_not_imported_for_other_devices(tmp_path: Path) -> None:
    assert _output_of(USES_CPU, tmp_path, "raise RuntimeError('imported')") == "[]"


@pytest.mark.parametrize(
    ("torch_npu", "told"),
    [
        ("raise ImportError('libhccl.so: cannot open')", ("libhccl.so", "graft-moe[npu]", "set_env.sh")),
        ("import torch, types; torch.npu = types.SimpleNamespace(is_available=lambda: False)", ("no NPU", "npu-smi")),
    ],
    ids=["no CANN", "no device"],
)
def test_a_missing_npu_is_told_in_a_sentence(torch_npu: str, told: tuple[str, ...], tmp_path: Path) -> None:
    message = _output_of(OPENS_NPU, tmp_path, torch_npu)
    assert message.startswith("device = 'npu': ") and all(part in message for part in told)
