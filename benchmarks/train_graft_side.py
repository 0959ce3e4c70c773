"""Graft's part of train_vs_peft: the trainer itself, with its log, on the shared rows.

    python -m benchmarks.train_graft_side --model DIR --dtype D --batch B --steps N --threads T
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.train_side import (
    CLIP_NORM,
    LEARNING_RATE,
    LORA_RANK,
    SideResult,
    limit_process,
    parser,
    print_result,
    run,
)
from runtime.distributed.mesh import MeshShape, make_mesh
from runtime.trainer.config import DataConfig, LoraSettings, OptimizerConfig, TrainConfig
from runtime.trainer.data.documents import Document
from runtime.trainer.data.rows import RowStream
from runtime.trainer.loop import Training
from runtime.trainer.parameters import num_elements
from runtime.trainer.run_data import RunData


class GivenRows:
    """The rows of the step that is next, in the place of a stream."""

    def __init__(self) -> None:
        self.rows: list[Document] = []

    def row(self, index: int) -> tuple[Document, ...]:
        """The next row of the step."""
        return (self.rows[index % len(self.rows)],)

    def epoch_of(self, index: int) -> float:
        """There are no epochs."""
        return 0.0


def measure(arguments: argparse.Namespace, output: Path) -> SideResult:
    """Load, then train on the shared rows."""
    config = TrainConfig(
        model=arguments.model,
        output=output,
        data=DataConfig(train=(arguments.model / "config.json",), max_length=arguments.length),
        lora=LoraSettings(("experts",), LORA_RANK),
        optimizer=OptimizerConfig(LEARNING_RATE, schedule="constant", clip_norm=CLIP_NORM),
        steps=arguments.warmup + arguments.steps,
        batch_rows=arguments.batch,
        micro_batch_rows=arguments.batch,
        dtype=arguments.dtype,
        check_replicas_every=0,
        measure_mfu=False,
    )
    config.validate()
    given = GivenRows()
    data = RunData(cast(RowStream, given), [], [], config.steps or 0)
    training = Training(config, make_mesh(MeshShape()), torch.device("cpu"), data=data)
    everything = np.ones(arguments.length, dtype=bool)

    def step(ids: Tensor) -> float:
        given.rows = [Document(row.numpy().astype(np.int32), everything) for row in ids]
        return training.train_step()

    result = run("graft", arguments, step, num_elements(training.model.parameters))
    training.close()
    return result


def main() -> None:
    """Command line: see the module's text."""
    arguments = parser(__doc__).parse_args()
    limit_process(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print_result(measure(arguments, Path(folder)))


if __name__ == "__main__":
    main()
