"""Runs of the real command on the bundled model, in this process or as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from runtime.cli import main
from runtime.env import child_environment

REPOSITORY = Path(__file__).resolve().parents[3]
DEMO = REPOSITORY / "runtime" / "demo"
MODEL = DEMO / "model"
ROWS = DEMO / "tasks" / "date-iso.jsonl"
NUM_STEPS = 6
# Everything that draws numbers or keeps a state of its own.
OPTIONS: dict[str, Any] = {
    "lora": {"targets": ["experts", "q_b_proj", "o_proj"], "rank": 4, "dropout": 0.2},
    "routing": {"aux_loss": 0.1},
    "selection": {"threshold": 0.5, "sample_rows": 8},
    "optimizer": {"lr": 1e-3, "lora_plus_ratio": 4.0, "warmup_steps": 2, "weight_decay": 0.01},
    "eval_every": 2,
}


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """The lines for the user: those of the command itself, not of its log."""
        return [line for line in self.err.splitlines() if line.startswith("graft")]


def write_rows(path: Path, num_rows: int = 40) -> Path:
    """A JSONL file of prompt-completion rows."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()[:num_rows]]
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) + "\n" for r in rows))
    return path


def write_config(path: Path, data: Path, output: Path, **changes: Any) -> Path:
    """A configuration of a few steps; `changes` replace whole keys."""
    config: dict[str, Any] = {
        "model": str(MODEL),
        "output": str(output),
        "data": {"train": [str(data)], "max_length": 48, "template": "plain", "eval_fraction": 0.2},
        "lora": {"targets": ["o_proj"], "rank": 4},  # few tensors, so that checkpoints cost little
        "steps": NUM_STEPS,
        "batch_rows": 2,
        "save_every": 2,
        "dtype": "float32",
        "measure_mfu": False,
    }
    path.write_text(yaml.safe_dump({key: value for key, value in (config | changes).items() if value is not None}))
    return path


def start(*command: object, **environment: str) -> subprocess.Popen[str]:
    """`python -m COMMAND...` with as many threads as this process, so that sums are rounded alike."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=REPOSITORY,
        env=child_environment() | threads | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Said:
    """Wait for it to end."""
    out, err = process.communicate(timeout=timeout)
    return Said(process.returncode, out, err)


Graft = Callable[..., Said]


def graft_in(capfd: pytest.CaptureFixture[str]) -> Graft:
    """The command `graft` in this process."""

    def graft(*arguments: object) -> Said:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Said(status, *capfd.readouterr())

    return graft


def log_lines(output: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of a run's log."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line, in the file's order."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in log_lines(output, "step")]


def adapter_bytes(output: Path, name: str = "adapter") -> bytes:
    """The weights as they lie on disk."""
    return (output / name / "adapter_model.safetensors").read_bytes()


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter's folder by their names."""
    return load_file(folder / "adapter_model.safetensors")
