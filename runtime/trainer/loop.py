"""The training loop of one process: rows in, optimizer steps, log, evaluation, checkpoints, the adapter at the end."""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from runtime.distributed.mesh import Mesh, gather_objects, sum_numbers, together
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops.platform import keep_freed_memory
from runtime.trainer.checkpoint import (
    CheckpointProblem,
    RunState,
    checkpoints,
    good_checkpoints,
    load_checkpoint,
    open_checkpoint,
    remove_old,
    save_checkpoint,
)
from runtime.trainer.config import ADAPTER, BEST_ADAPTER, CHECKPOINTS, COMPUTE_DTYPES, TrainConfig
from runtime.trainer.config_file import as_plain
from runtime.trainer.evaluate import evaluate
from runtime.trainer.fingerprint import fingerprint
from runtime.trainer.model import TrainedModel, check_base_fits, prepare_model
from runtime.trainer.optimizer import learning_rate, make_optimizer, set_learning_rate
from runtime.trainer.output import OutputLock, check_output, check_shared, remove_earlier_run
from runtime.trainer.parameters import num_elements
from runtime.trainer.pipeline import gradients_of
from runtime.trainer.replicas import check_replicas, clip_gradients, gradient_norm, sum_gradients
from runtime.trainer.report.run_report import RunReport
from runtime.trainer.results import write_result
from runtime.trainer.resume import (
    check_nothing_is_lost,
    check_same_inputs,
    check_same_run,
    find_checkpoint,
    is_own_checkpoint,
)
from runtime.trainer.run_data import RunData, read_run_data
from runtime.trainer.step_data import row_width, step_data

logger = logging.getLogger(__name__)


class Diverged(ValueError):
    """The numbers of a run are not finite any more; nothing after that is worth keeping."""


class Training:
    """One run in one process; `run` does all of it."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        device: torch.device,
        resume: str | None = None,
        data: RunData | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Read the data, load the base, spread or resume the factors.

        `resume`: "latest", or a checkpoint's name or folder. `data`: what was read already, or made otherwise.
        `overwrite`: an earlier run's results in the output give way, when all has been read and just before the first
        step.

        Raises ValueError (ConfigError, DataError, CheckpointError, CheckpointProblem) with a sentence for the user, on
        every process if on one.
        """
        self.config, self.mesh, self.device = config, mesh, device
        self._held = ExitStack()
        try:
            self._prepare(resume, data, overwrite)
        except BaseException:
            self.close()
            raise

    def _prepare(self, resume: str | None, data: RunData | None, overwrite: bool) -> None:
        config, mesh, device = self.config, self.mesh, self.device
        keep_freed_memory(device)
        found, resumed = self._checkpoint_to_resume(resume, overwrite)
        self.base, self.data = together(lambda: self._read(data), mesh.world)
        self.model: TrainedModel = prepare_model(config, self.base, mesh, device, self.data.documents, resumed)
        self.inputs = fingerprint(self.data.documents, self.data.evaluation, self.model.stage)
        self.optimizer = make_optimizer(self.model.parameters, config.optimizer)
        self.step, self.best_loss, self.best_step = 0, None, None
        self._saved_step: int | None = None  # a checkpoint after which nothing was removed yet
        if found is not None and resumed is not None:
            check_same_inputs(config, self.inputs, resumed.inputs)
            load_checkpoint(found, resumed.step, self.model.parameters, self.optimizer, mesh)
            check_replicas(self.model.parameters, mesh, resumed.step)
            self.step = resumed.step
            if is_own_checkpoint(found, config.output):  # elsewhere there is no adapter of the best one yet
                self.best_loss, self.best_step = resumed.best_loss, resumed.best_step
        self._gradients = gradients_of(
            self.model.stage, config.num_micro_batches, config.micro_batch_rows * row_width(config)
        )
        if overwrite:
            together(lambda: remove_earlier_run(config.output) if mesh.world.rank == 0 else None, mesh.world)
        self.report = together(
            lambda: RunReport(config, self.base, self.model, mesh, self.data.num_steps, resumed, found), mesh.world
        )
        self._held.callback(self.report.close)
        self._log_start()

    def run(self) -> Path | None:
        """Train to the end; the folder of the adapter on process 0. A failed checkpoint does not end the run."""
        try:
            while self.step < self.data.num_steps:
                self.train_step()
                self.after_step()
            return self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Close the log and let another run have the output."""
        self._held.close()

    def train_step(self) -> float:
        """One optimizer step over `batch_rows` rows; the mean loss over its target tokens."""
        begin = time.perf_counter()
        config, mesh = self.config, self.mesh
        first_row = self.step * config.batch_rows
        rows = [self.data.rows.row(first_row + index) for index in range(config.batch_rows)]
        data = step_data(config, rows, first_row, mesh.dp, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        own_loss = self._gradients(data.micro_batches)
        sum_gradients(self.model.parameters, mesh)
        norm = gradient_norm(self.model.parameters, mesh)
        if not math.isfinite(norm):
            raise Diverged(self._divergence(f"step {self.step + 1}: the gradients are not finite"))
        self._remove_old_checkpoints()  # the newest one has just proved to be good
        if config.optimizer.clip_norm is not None:
            clip_gradients(self.model.parameters, norm, config.optimizer.clip_norm)
        self.step += 1
        lr = learning_rate(config.optimizer, self.step, self.data.num_steps)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        (loss,) = sum_numbers([own_loss / mesh.tp.size], mesh.world)
        seconds = time.perf_counter() - begin
        self.report.step(self.step, self.data.rows.epoch_of(first_row), loss, lr, norm, data, rows, seconds)
        return loss

    def after_step(self) -> None:
        """What is due after an optimizer step: the replicas compared, an evaluation, a checkpoint."""
        config, step = self.config, self.step
        if config.check_replicas_every and step % config.check_replicas_every == 0:
            check_replicas(self.model.parameters, self.mesh, step)
        is_last = step == self.data.num_steps
        if self.data.evaluation and (is_last or (config.eval_every and step % config.eval_every == 0)):
            self._evaluate()
        is_best = self.best_step == step
        if config.save_every and (is_last or is_best or step % config.save_every == 0):
            self._save()
        if is_last:  # no step comes to prove it
            self._remove_old_checkpoints()

    def _checkpoint_to_resume(self, resume: str | None, overwrite: bool) -> tuple[Path | None, RunState | None]:
        config, world = self.config, self.mesh.world

        def take_output() -> None:
            if world.rank == 0:
                check_output(config.output)
                self._held.callback(OutputLock(config.output).release)

        together(take_output, world)
        check_shared(config.output, world)
        found = together(lambda: find_checkpoint(config.output, resume, overwrite=overwrite), world)
        if found is None:
            return None, None
        resumed = open_checkpoint(found, self.mesh)
        check_same_run(config, resumed)
        together(lambda: check_nothing_is_lost(found, config.output), world)
        return found, resumed

    def _read(self, data: RunData | None) -> tuple[DeepseekConfig, RunData]:
        base = DeepseekConfig.from_dir(self.config.model)
        check_base_fits(self.config, base)
        return base, data or read_run_data(self.config, base, logger.info if self.mesh.world.rank == 0 else None)

    def _divergence(self, seen: str) -> str:
        """What to do: the factors after `step` steps are lost, those of every step before it were good."""
        config, changes = self.config, ["a lower optimizer.lr"]
        if config.optimizer.clip_norm is None:
            changes.append("an optimizer.clip_norm")
        if config.dtype != COMPUTE_DTYPES[-1]:
            changes.append(f"dtype: {COMPUTE_DTYPES[-1]}")
        good = good_checkpoints(config.output / CHECKPOINTS, self.step)
        kept = f"; {good[-1]} is from before that, and graft export writes its adapter" if good else ""
        return (
            f"{seen}, training diverged: start a new run in another output with {' or '.join(changes)} (--resume keeps "
            f"the settings, so it would diverge again){kept}"
        )

    def _evaluate(self) -> None:
        found = evaluate(self.config, self.data.evaluation, self.model.stage)
        self.report.evaluation(self.step, found)
        if not math.isfinite(found.loss):
            raise Diverged(self._divergence(f"step {self.step}: the evaluation loss is not finite"))
        if self.best_loss is None or found.loss < self.best_loss:
            self.best_loss, self.best_step = found.loss, self.step
            self._export(BEST_ADAPTER)

    def _save(self) -> None:
        """A checkpoint that cannot be written is told; the earlier ones stay, and the next one is tried in its turn."""
        folder = self.config.output / CHECKPOINTS
        settings, metrics = as_plain(self.config), self.report.metrics()
        state = RunState(
            self.step, settings, self.model.experts, self.inputs, metrics, self.best_loss, self.best_step
        )
        try:
            save_checkpoint(folder, state, self.model.parameters, self.optimizer, self.mesh)
        except CheckpointProblem as problem:
            if self.mesh.world.rank == 0:
                kept = ", ".join(path.name for path in checkpoints(folder)) or "none"
                logger.error("%s; training goes on; whole checkpoints: %s", problem, kept)
            return
        self._saved_step = self.step

    def _remove_old_checkpoints(self) -> None:
        """Of earlier checkpoints, once the newest is known to be good: a run may diverge in the step before it."""
        if self._saved_step is not None and self.mesh.world.rank == 0:
            folder, num_kept = self.config.output / CHECKPOINTS, self.config.keep_checkpoints
            remove_old(folder, self._saved_step, num_kept, self.best_step)
        self._saved_step = None

    def _finish(self) -> Path | None:
        check_replicas(self.model.parameters, self.mesh, self.step)
        path = self._export(ADAPTER)
        self.report.finish()
        return path

    def _export(self, name: str) -> Path | None:
        problem = write_result(self.config, self.base, self.model, self.mesh, self.report.metrics(), name)
        told = next((other for other in gather_objects(problem, self.mesh.world) if other), None)
        if told and name == ADAPTER:
            raise CheckpointProblem(f"{told}; {self._what_is_kept()}")
        if told and self.mesh.world.rank == 0:
            logger.error("%s; training goes on", told)
        return self.config.output / name if self.mesh.world.rank == 0 else None

    def _what_is_kept(self) -> str:
        """After the adapter could not be written: a checkpoint from which it can be, made now if there is none."""
        if not self.config.save_every:
            self._save()
        kept = checkpoints(self.config.output / CHECKPOINTS)
        if not kept:
            return "no checkpoint could be written either: make room, and train again"
        return f"checkpoint {kept[-1].name} is whole: make room, then go on with --resume"

    def _log_start(self) -> None:
        total = sum_numbers([_share_counted_once(self.model, self.mesh)], self.mesh.world)[0]
        if self.mesh.world.rank == 0:
            logger.info("training %s factors' parameters; frozen: the base with its router, bias, norms and "
                        "embeddings", f"{round(total):,}")  # fmt: skip
            if self.step:
                logger.info("resumed after step %d of %d", self.step, self.data.num_steps)


def _share_counted_once(model: TrainedModel, mesh: Mesh) -> float:
    return sum(num_elements([parameter]) / parameter.replicas(mesh).size for parameter in model.parameters)

