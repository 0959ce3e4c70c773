"""The stub libraries: what they are built from, and what is said where they cannot be built."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu.bench import stubs

SONAMES = {"libascendcl.so", "libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so",
           "libacl_tdt_channel.so", "libatb.so"}


def test_the_libraries_of_cann_are_built_and_let_torch_npu_be_imported(tmp_path: Path) -> None:
    """Only a new process can import torch_npu with these libraries and no others."""
    without = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    built = subprocess.run([sys.executable, "-m", "tests.npu.bench.stubs", str(tmp_path)], env=without, check=True,
                           capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert {path.name for path in tmp_path.iterdir()} == SONAMES and "7 stub libraries" in built.stdout
    code = "import torch, torch_npu; print(sum(s.name[:5] == 'npu::' for s in torch._C._jit_get_all_schemas()))"
    imported = subprocess.run([sys.executable, "-c", code], env=without | {"LD_LIBRARY_PATH": str(tmp_path)},
                              capture_output=True, text=True, check=True)
    assert imported.stdout.splitlines()[-1] == "425"


def test_a_stub_function_returns_an_error_code(tmp_path: Path) -> None:
    library = stubs._compile(stubs.source(["aclInit", "_ZN3atb13CreateContextEPPNS_7ContextE"]), "libstub.so", tmp_path)
    loaded = ctypes.CDLL(str(library))
    assert loaded.aclInit() == stubs.ERROR_CODE
    assert loaded._ZN3atb13CreateContextEPPNS_7ContextE() == stubs.ERROR_CODE


def test_a_missing_compiler_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stubs.main([str(tmp_path / "out")]) == 1
    assert "gcc, nm, readelf not found: the stubs need gcc and binutils" in capsys.readouterr().err
