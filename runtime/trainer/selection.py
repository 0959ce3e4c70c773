"""Expert selection (ESFT, Wang et al. 2024, arXiv:2407.01906): which experts of each layer a task uses.

Shape suffixes: T tokens, K choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed.mesh import gather_objects
from runtime.trainer.config import SelectionConfig, TrainConfig
from runtime.trainer.data.documents import Document
from runtime.trainer.data.rows import RowStream
from runtime.trainer.micro_batch import MicroBatch
from runtime.trainer.moe import RoutingObserver
from runtime.trainer.pipeline import forward_only
from runtime.trainer.stage import TrainingStage
from runtime.trainer.step_data import step_data

ExpertsOfLayers = Mapping[int, tuple[int, ...]]


def select_experts(
    config: TrainConfig, selection: SelectionConfig, documents: Sequence[Document], stage: TrainingStage
) -> ExpertsOfLayers:
    """Layer -> experts to train, of all layers of the base; every process calls this and gets the same."""
    scores = {layer: torch.zeros(stage.config.n_routed_experts, dtype=torch.float64) for layer in stage.moe_layers()}
    micro_batches, num_rows = _sample(config, selection, documents, stage)
    for layer, moe in stage.moe_layers().items():
        moe.observe_routing = _observer(scores[layer], selection.by, num_rows * config.data.max_length)
    stage.eval()
    for _batch, _hidden in forward_only(stage, micro_batches):
        pass
    stage.train()
    for moe in stage.moe_layers().values():
        moe.observe_routing = None
    chosen = {}
    for layer, score_E in scores.items():
        if stage.mesh.dp.handle is not None:
            dist.all_reduce(score_E, group=stage.mesh.dp.handle)
        chosen[layer] = fewest_reaching(score_E, selection.threshold)
    merged: dict[int, tuple[int, ...]] = {}
    for of_stage in gather_objects(chosen, stage.mesh.pp):
        merged.update(of_stage)  # type: ignore[call-overload]
    return dict(sorted(merged.items()))


def fewest_reaching(score_E: Tensor, threshold: float) -> tuple[int, ...]:
    """The fewest experts whose share of the whole score reaches the threshold; at equal scores the lower index goes."""
    shares_E = (score_E / score_E.sum()).tolist()
    order = sorted(range(len(shares_E)), key=lambda expert: (-shares_E[expert], expert))
    chosen: list[int] = []
    reached = 0.0
    for expert in order:
        if reached >= threshold - 1e-12:
            break
        chosen.append(expert)
        reached += shares_E[expert]
    return tuple(sorted(chosen))


def _observer(score_E: Tensor, by: str, num_ids: int) -> RoutingObserver:
    """Adds each real token's weights, summing to 1 a token (gate_score), or its choices (token_share).

    Tokens whose place in the run is `num_ids` or more only fill up.
    """

    def observe(weights_TK: Tensor, experts_TK: Tensor, batch: MicroBatch) -> None:
        if by == "gate_score":
            worth_TK = weights_TK.double() / weights_TK.double().sum(-1, keepdim=True)
        else:
            worth_TK = torch.ones_like(weights_TK, dtype=torch.float64)
        worth_TK = worth_TK * (batch.is_real_T & (batch.ids_T < num_ids))[:, None]
        score_E.index_add_(0, experts_TK.flatten().cpu(), worth_TK.flatten().cpu())

    return observe


def _sample(
    config: TrainConfig, selection: SelectionConfig, documents: Sequence[Document], stage: TrainingStage
) -> tuple[list[MicroBatch], int]:
    """The run's first documents, one a row, and how many these are; rows that fill up come after them."""
    data = replace(config.data, pack=False)
    stream = RowStream(documents, data, config.seed)
    per_turn = config.micro_batch_rows * stage.mesh.dp.size
    num_rows = min(selection.sample_rows, stream.num_rows(1))
    # Every replica needs the same number of micro-batches, as exchanges between experts do.
    rows = [stream.row(index) for index in range(num_rows + -num_rows % per_turn)]
    return step_data(config, rows, 0, stage.mesh.dp, stage.placement.device).micro_batches, num_rows
