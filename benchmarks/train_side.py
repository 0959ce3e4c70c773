"""What both sides of train_vs_peft share: the command line, the data, the clock and the result.

    python -m benchmarks.train_SIDE --model DIR --dtype D --batch B --steps N --threads T [--warmup W] [--length L] ...

A side trains `--warmup` and then `--steps` steps in its own process and prints a `SideResult` as JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

LORA_RANK = 16
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
DTYPES = ("bfloat16", "float32")
MAX_GIB = 16.0


@dataclass(frozen=True)
class SideResult:
    """One process's run. `losses` are of all steps, the warm-up first; `seconds_per_step` of the timed ones.

    `peak_bytes` is the largest resident size of the process, loading included; `training_peak_bytes` that after
    loading, None where the kernel cannot tell.
    """

    side: str
    dtype: str
    batch: int
    length: int
    seconds_per_step: list[float]
    losses: list[float]
    peak_bytes: int
    training_peak_bytes: int | None
    trainable_parameters: int
    experts: str = ""

    @classmethod
    def parse(cls, line: str) -> SideResult:
        """From the line that a side printed."""
        return cls(**json.loads(line))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a side; `--model` is the folder of the base."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--dtype", choices=DTYPES, required=True)
    arguments.add_argument("--batch", type=int, required=True)
    arguments.add_argument("--steps", type=int, required=True)
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--warmup", type=int, default=2)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--max-gib", type=float, default=MAX_GIB, help="end rather than take more memory than this")
    return arguments


def limit_process(arguments: argparse.Namespace) -> None:
    """Hold this process to the threads and the memory that either side may have."""
    num_bytes = int(arguments.max_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    torch.set_num_threads(arguments.threads)


def token_ids(model: Path, step: int, batch: int, length: int) -> Tensor:
    """int64 [batch, length]: the rows of one step, the same on both sides; every token but the first is a target."""
    vocab_size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(2, vocab_size, (batch, length), generator=generator)


def run(
    side: str,
    arguments: argparse.Namespace,
    step: Callable[[Tensor], float],
    trainable_parameters: int,
    experts: str = "",
) -> SideResult:
    """Time `step`, which takes token ids [batch, length], makes one optimizer step and returns the mean loss."""
    loading_peak = _peak_bytes()
    knows_training_peak = _forget_peak()
    seconds, losses = [], []
    for number in range(arguments.warmup + arguments.steps):
        ids = token_ids(arguments.model, number, arguments.batch, arguments.length)
        begin = time.perf_counter()
        losses.append(step(ids))
        seconds.append(time.perf_counter() - begin)
    training_peak = _peak_bytes()
    return SideResult(
        side=side,
        dtype=arguments.dtype,
        batch=arguments.batch,
        length=arguments.length,
        seconds_per_step=seconds[arguments.warmup :],
        losses=losses,
        peak_bytes=max(loading_peak, training_peak),
        training_peak_bytes=training_peak if knows_training_peak else None,
        trainable_parameters=trainable_parameters,
        experts=experts,
    )


def print_result(result: SideResult) -> None:
    """The last line of a side's output."""
    print(json.dumps(asdict(result)), flush=True)


def _peak_bytes() -> int:
    """The largest resident size since the start, or since `_forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _forget_peak() -> bool:
    """Let the peak begin anew; False where the kernel does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True
