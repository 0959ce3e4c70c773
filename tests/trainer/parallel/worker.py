"""One process of a test's training runs: `python -m tests.trainer.parallel.worker JOB.json`, with torchrun's variables.

A job is a list of runs that follow each other in the same processes, each with its own mesh.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.distributed.mesh import Mesh, barrier, make_mesh, start_processes, stop_processes
from runtime.env import process_rank
from runtime.trainer.config_file import from_plain
from runtime.trainer.data.documents import Document
from runtime.trainer.data.rows import RowStream
from runtime.trainer.gather import gather_adapter
from runtime.trainer.initialise import distribute, draw
from runtime.trainer.loop import Training
from runtime.trainer.micro_batch import MicroBatch
from runtime.trainer.parameters import Side
from runtime.trainer.run_data import RunData
from runtime.trainer.stage import mesh_shape
from tests.trainer.parallel.faults import UNSHARED, fault_after_step, fault_at_start

NUM_DOCUMENTS = 40
VOCAB_SIZE = 320
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """`config`: a TrainConfig in plain form. `output`: a file for the result of process 0.

    `fault`: what goes wrong in it, by its name in `faults`. `fails`: the run must end with an error, which each process
    writes beside `output`.
    """

    config: dict[str, Any]
    output: str
    resume: str | None = None
    stop_after: int | None = None
    fault: str | None = None
    fails: bool = False


def documents(seed: int, longest: int) -> list[Document]:
    """Random documents of uneven lengths, about half of their tokens learnt."""
    random = np.random.Generator(np.random.PCG64(seed))
    found = []
    for _ in range(NUM_DOCUMENTS):
        length = int(random.integers(4, longest + 1))
        ids = random.integers(2, VOCAB_SIZE, length).astype(np.int32)
        found.append(Document(ids, random.random(length) < 0.5))
    return found


def start_training(run: Run, mesh: Mesh) -> Training:
    """A training whose B factors are not zero, so that A's first gradients count."""
    config = from_plain(run.config, "job")
    config.validate()
    if run.fault == UNSHARED and mesh.world.rank:
        config = replace(config, output=config.output.with_name(f"{config.output.name}-elsewhere"))
    longest = config.data.max_length // 2
    train = documents(1, longest)
    data = RunData(RowStream(train, config.data, config.seed), train, documents(2, longest), config.steps or 1)
    training = Training(config, mesh, CPU, run.resume, data)
    if run.resume is None:
        for parameter in training.model.parameters:
            if parameter.side is Side.B:
                distribute(parameter, mesh, _drawn_b)
    return training


def _drawn_b(name: str, shape: tuple[int, int]) -> Tensor:
    return draw(name, shape, "gaussian", seed=5) * 0.3


def result_of(run: Run, training: Training, mesh: Mesh, evaluate: Callable[[Training], dict[str, float]]) -> None:
    """Train and leave losses, gradient norms, tokens of each expert and the adapter in `run.output`."""
    num_steps = run.stop_after or training.data.num_steps
    losses, norms, tokens = [], _norms_of(training), _tokens_of_experts(training)
    while training.step < num_steps:
        losses.append(training.train_step())
        with fault_after_step(run.fault, training):
            training.after_step()
    for moe in training.model.stage.moe_layers().values():
        moe.observe_routing = None
    adapter = gather_adapter(training.model.parameters, mesh)
    scores = evaluate(training)
    if adapter is not None:
        tensors = {f"{name}.{side}": getattr(pair, side) for name, pair in adapter.linears.items() for side in "ab"}
        for layer, experts in adapter.experts.items():
            for expert, lora in experts.items():
                for projection in ("gate", "up", "down"):
                    pair = getattr(lora, projection)
                    tensors[f"{layer}.{expert}.{projection}.a"] = pair.a
                    tensors[f"{layer}.{expert}.{projection}.b"] = pair.b
        found = {"losses": losses, "norms": norms, "tokens": tokens, "scores": scores, "adapter": tensors}
        torch.save(found, run.output)


def _norms_of(training: Training) -> list[float]:
    """The gradient norm of every step from now on, as the run takes it: before clipping."""
    norms: list[float] = []
    log_step = training.report.step

    def step(*arguments: Any) -> None:
        norms.append(arguments[4])
        log_step(*arguments)

    training.report.step = step  # type: ignore[method-assign]
    return norms


def _tokens_of_experts(training: Training) -> dict[int, Tensor]:
    """Layer of this process's stage -> how often each expert is chosen from now on."""
    tokens = {}
    for layer, moe in training.model.stage.moe_layers().items():
        tokens[layer] = torch.zeros(len(moe.experts.experts) * training.mesh.ep.size, dtype=torch.int64)

        def observe(weights_TK: Tensor, experts_TK: Tensor, batch: MicroBatch, count_E: Tensor = tokens[layer]) -> None:
            count_E += torch.bincount(experts_TK[batch.is_real_T].flatten(), minlength=len(count_E))

        moe.observe_routing = observe
    return tokens


def _scores(training: Training) -> dict[str, float]:
    from runtime.trainer.evaluate import evaluate

    found = evaluate(training.config, training.data.evaluation, training.model.stage)
    return {"loss": found.loss, "exact_match": found.exact_match, "documents": found.num_documents}


def carry_out(run: Run, mesh: Mesh) -> None:
    """The whole run, in this process's part."""
    with fault_at_start(run.fault):
        training = start_training(run, mesh)
    try:
        result_of(run, training, mesh, _scores)
    finally:
        training.close()


def main(job: Path) -> int:
    """Run all; an error of a run is its result, and ends the job unless the run is meant to fail."""
    torch.set_num_threads(1)
    rank, world_size, _ = process_rank()
    start_processes(CPU, rank, world_size, timeout_seconds=120)
    try:
        for raw in json.loads(job.read_text()):
            run = Run(**raw)
            mesh = make_mesh(mesh_shape(from_plain(run.config, "job").parallel), rank)
            try:
                carry_out(run, mesh)
            except (ValueError, RuntimeError) as error:
                Path(f"{run.output}.error.{rank}").write_text(f"{type(error).__name__}: {error}")
                if not run.fails:
                    return 1
            barrier(mesh.world)
    finally:
        stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
