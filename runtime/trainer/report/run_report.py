"""What a run tells while it goes: its log, progress line and metrics, and the loss curve at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.distributed.mesh import Mesh, sum_numbers
from runtime.errors import GraftError
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops.platform import memory_peak_bytes
from runtime.trainer.checkpoint import RunState
from runtime.trainer.config import CURVE, TrainConfig
from runtime.trainer.evaluate import Evaluation
from runtime.trainer.model import TrainedModel
from runtime.trainer.plan import tensor_infos
from runtime.trainer.report.curve import draw_curve
from runtime.trainer.report.flops import CONVENTION, PEAK, LoraSize, measure_peak, mfu, step_flops
from runtime.trainer.report.log import LOG_NAME, TrainingLog
from runtime.trainer.report.progress import EvalRecord, StepRecord
from runtime.trainer.step_data import Row, StepData

logger = logging.getLogger(__name__)


class RunReport:
    """Log, progress and metrics; process 0 writes them, the others take part in the sums."""

    def __init__(
        self,
        config: TrainConfig,
        base: DeepseekConfig,
        model: TrainedModel,
        mesh: Mesh,
        num_steps: int,
        resumed: RunState | None,
        found: Path | None,
    ) -> None:
        """`resumed` is what the checkpoint `found` says, None for a new run; raises ValueError (`TrainingLog`)."""
        self._config, self._base, self._model, self._mesh, self._num_steps = config, base, model, mesh, num_steps
        self._log: TrainingLog | None = None
        self._peak: float | None = None
        self._seconds: list[float] = []
        self._metrics: dict[str, float] = {} if resumed is None else dict(resumed.metrics)
        self._lora_size = LoraSize.of(tensor_infos(base, config, model.experts))
        if mesh.world.rank == 0:
            step = None if resumed is None else resumed.step
            earlier = None if found is None else found.resolve().parent.parent / LOG_NAME
            self._log = TrainingLog(config.output, num_steps, resumed_step=step, resumed_log=earlier)
            placement = model.stage.placement
            if config.measure_mfu:
                self._peak = measure_peak(placement.device, placement.dtype) * mesh.world.size
            self._tell_mfu(0 if step is None else step)

    def step(
        self,
        step: int,
        epoch: float,
        loss: float,
        lr: float,
        norm: float,
        data: StepData,
        rows: Sequence[Row],
        seconds: float,
    ) -> None:
        """Log one optimizer step, every `log_every` of them and the last."""
        balance, dropped = self._routing()
        self._seconds = [*self._seconds[-19:], seconds]
        self._metrics |= {"train loss": loss, "steps": step}
        if self._log is None or (step % self._config.log_every and step != self._num_steps):
            return
        used = None
        if self._peak is not None:
            lengths = (len(document) for row in rows for document in row)
            flops = step_flops(self._base, lengths, data.num_targets, self._lora_size)
            used = mfu(flops, seconds, self._peak)
        left = (self._num_steps - step) * sum(self._seconds) / len(self._seconds)
        self._log.step(
            StepRecord(step, epoch, loss, lr, norm, data.num_tokens, data.num_targets, seconds,
                       data.num_tokens / seconds, left, used, balance, dropped)
        )  # fmt: skip

    def _tell_mfu(self, step: int) -> None:
        """What the MFU of every line is a share of, or that there is none."""
        if self._log is None:
            return
        if self._peak is None:
            logger.info("no MFU: measure_mfu is false, so the peak is not known")
        else:
            logger.info("MFU: %s; %s, %.3g FLOP/s over all processes", CONVENTION, PEAK, self._peak)
        self._log.event(step, "start", flops_convention=CONVENTION, peak_flops_per_second=self._peak)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Log an evaluation."""
        self._metrics |= {"eval loss": found.loss, "eval exact match": found.exact_match}
        if self._log is not None:
            self._log.evaluation(EvalRecord(step, found.loss, found.exact_match, found.num_documents))

    def metrics(self) -> Mapping[str, float]:
        """The newest numbers, for the model card."""
        return self._metrics

    def finish(self) -> None:
        """Draw the loss curve and tell the peak memory."""
        device = self._model.stage.placement.device
        peak = memory_peak_bytes(device) / 2**30
        if self._log is None:
            return
        self._log.event(self._num_steps, "end", peak_gib=round(peak, 3))
        logger.info("peak memory of process 0: %.2f GiB", peak)
        try:
            draw_curve(self._config.output / LOG_NAME, self._config.output / CURVE)
        except (OSError, ValueError, GraftError) as cause:
            logger.warning("no loss curve: %s", cause)

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()

    def _routing(self) -> tuple[float | None, float | None]:
        """The step's balance loss (mean over layers) and dropped share, if they are in use; resets what was counted."""
        routing = self._config.routing
        found = [moe.statistics for moe in self._model.stage.moe_layers().values()]
        sums = [
            sum(statistics.balance_loss for statistics in found),
            float(len(found)),
            float(sum(statistics.num_dropped for statistics in found)),
            float(sum(statistics.num_choices for statistics in found)),
        ]
        for moe in self._model.stage.moe_layers().values():
            moe.reset_statistics()
        if not routing.aux_loss and routing.capacity_factor is None:
            return None, None
        balance, layers, dropped, choices = sum_numbers(sums, self._mesh.world)
        mean = balance / max(1.0, layers / self._mesh.dp.size) if routing.aux_loss else None
        return mean, dropped / max(1.0, choices) if routing.capacity_factor is not None else None
