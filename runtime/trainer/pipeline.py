"""Forward and backward of a step's micro-batches, through one stage or through a pipeline of them (1F1B).

Not the zero-bubble schedules: with a frozen first stage they lose gradients of the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from runtime.trainer.micro_batch import MicroBatch
from runtime.trainer.stage import TrainingStage

ComputeGradients = Callable[[Sequence[MicroBatch]], float]


def gradients_of(stage: TrainingStage, num_micro_batches: int, tokens_per_batch: int) -> ComputeGradients:
    """A function that adds a step's gradients to the factors and returns this replica's loss (0 but on the last stage).

    `tokens_per_batch` (rows x width) is what the pipeline's stages pass on; without a pipeline it may vary.
    """
    if stage.mesh.pp.size == 1:
        return lambda micro_batches: _plain_gradients(stage, micro_batches)
    return _Pipeline(stage, num_micro_batches, tokens_per_batch)


def _plain_gradients(stage: TrainingStage, micro_batches: Sequence[MicroBatch]) -> float:
    losses: list[Tensor] = []
    for batch in micro_batches:
        loss = stage.losses(stage.hidden(None, batch), batch).losses_N.sum() * batch.loss_weight
        loss.backward()
        losses.append(loss.detach())
    return _sum(losses)


def _sum(losses: Sequence[Tensor]) -> float:
    """In float64 on the host, which waits for the device here and not after each micro-batch."""
    return float(torch.stack([loss.detach() for loss in losses]).cpu().double().sum()) if losses else 0.0


class _Pipeline:
    """A schedule made once; micro-batches reach the stages by their number, which is what the schedule splits."""

    def __init__(self, stage: TrainingStage, num_micro_batches: int, tokens_per_batch: int) -> None:
        pp, placement = stage.mesh.pp, stage.placement
        self._module = _NumberedStage(stage)
        self._numbers = torch.arange(num_micro_batches)
        shape = (tokens_per_batch, stage.config.hidden_size)
        hidden = torch.empty(shape, dtype=placement.dtype, device="meta", requires_grad=True)
        loss = torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
        pipeline_stage = PipelineStage(
            self._module,
            pp.rank,
            pp.size,
            placement.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if stage.is_first else hidden,
            output_args=loss if stage.is_last else hidden,
            group=pp.handle,
        )
        self._schedule = Schedule1F1B(pipeline_stage, num_micro_batches, loss_fn=_loss_itself, scale_grads=False)

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> float:
        self._module.micro_batches = micro_batches
        losses: list[Tensor] = []
        arguments = (self._numbers,) if self._module.stage.is_first else ()
        target = self._numbers if self._module.stage.is_last else None
        self._schedule.step(*arguments, target=target, losses=losses, return_outputs=False, number=self._numbers)
        self._module.micro_batches = ()
        return _sum(losses)


class _NumberedStage(nn.Module):
    """What the schedule calls: hidden states of the stage before (in the first one its number once more) -> its own."""

    def __init__(self, stage: TrainingStage) -> None:
        super().__init__()
        self.stage = stage
        self.micro_batches: Sequence[MicroBatch] = ()

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        batch = self.micro_batches[int(number)]
        hidden_TH = self.stage.hidden(None if self.stage.is_first else x, batch)
        if not self.stage.is_last:
            return hidden_TH
        return (self.stage.losses(hidden_TH, batch).losses_N.sum() * batch.loss_weight)[None]


def _loss_itself(output: Tensor, target: Tensor) -> Tensor:
    """The last stage's output is its loss already."""
    return output.sum()


@torch.no_grad()
def forward_only(stage: TrainingStage, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Each micro-batch with this stage's hidden states [T, H], passed on from stage to stage without gradients.

    Every process of the pipeline takes all of them, in the same order.
    """
    pp, placement = stage.mesh.pp, stage.placement
    for batch in micro_batches:
        x_TH = None
        if not stage.is_first:
            shape = (batch.token_ids_T.shape[0], stage.config.hidden_size)
            x_TH = torch.empty(shape, dtype=placement.dtype, device=placement.device)
            dist.recv(x_TH, pp.ranks[pp.rank - 1], group=pp.handle)
        hidden_TH = stage.hidden(x_TH, batch)
        if not stage.is_last:
            dist.send(hidden_TH.contiguous(), pp.ranks[pp.rank + 1], group=pp.handle)
        yield batch, hidden_TH
