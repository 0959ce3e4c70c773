"""The stage of this process, ready to train: built, filled from the base, experts chosen, factors spread."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loaders.progress import progress_bar
from runtime.distributed.mesh import Mesh, together
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops.base import make_ops
from runtime.trainer.checkpoint import RunState
from runtime.trainer.config import TrainConfig
from runtime.trainer.config_file import ConfigError
from runtime.trainer.data.documents import Document
from runtime.trainer.initialise import initialise
from runtime.trainer.load import load_stage
from runtime.trainer.parameters import LoraParameter
from runtime.trainer.replicas import check_replicas
from runtime.trainer.selection import ExpertsOfLayers, select_experts
from runtime.trainer.stage import StageOptions, TrainingStage, split_layers
from runtime.trainer.targets import is_routed, resolve_targets

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A stage, its factors, and the experts of each layer that are trained (None: all)."""

    stage: TrainingStage
    parameters: list[LoraParameter]
    experts: ExpertsOfLayers | None


def build_stage(config: TrainConfig, base: DeepseekConfig, mesh: Mesh, device: torch.device) -> TrainingStage:
    """The stage with uninitialised weights; raises ValueError if the base cannot be split so."""
    layers = split_layers(base.num_hidden_layers, config.parallel.pp, config.parallel.layers)[mesh.pp.rank]
    specs = resolve_targets(base, config.lora, config.seed)
    options = StageOptions(layers, specs, config.routing, config.activation_checkpointing)
    return TrainingStage(base, Placement(device, _DTYPES[config.dtype], make_ops(device)), mesh, options)


def check_base_fits(config: TrainConfig, base: DeepseekConfig) -> None:
    """Raises ConfigError naming what the base does not have or the mesh does not divide; needs no weight."""
    tp, ep = config.parallel.tp, config.parallel.expert_size
    divided = [
        ("tp", tp, base.num_attention_heads, "attention heads"),
        ("tp", tp, base.vocab_size, "entries of the vocabulary"),
        ("ep", ep, base.n_routed_experts, "routed experts"),
    ]
    if base.first_k_dense_replace:
        divided.append(("tp", tp, base.intermediate_size, "columns of the dense MLP"))
    if base.n_shared_experts:
        divided.append(("tp", tp, base.n_shared_experts * base.moe_intermediate_size, "columns of the shared experts"))
    for name, size, count, what in divided:
        if count % size:
            raise ConfigError(f"parallel.{name} = {size} does not divide the base's {count} {what}")
    if config.data.max_length > base.max_position_embeddings:
        longest = base.max_position_embeddings
        raise ConfigError(f"data.max_length = {config.data.max_length} is beyond the base's {longest} positions")
    split_layers(base.num_hidden_layers, config.parallel.pp, config.parallel.layers)
    specs = resolve_targets(base, config.lora, config.seed)
    if config.selection is not None and not any(is_routed(module) for module in specs):
        raise ConfigError("selection: no routed experts are among lora.targets; add experts, or leave selection out")


def prepare_model(
    config: TrainConfig,
    base: DeepseekConfig,
    mesh: Mesh,
    device: torch.device,
    documents: Sequence[Document],
    resumed: RunState | None,
) -> TrainedModel:
    """Build and fill the stage; the experts of a resumed run are those that it chose at its start."""
    stage = build_stage(config, base, mesh, device)
    with progress_bar("loading the base") as progress:
        shown = progress if mesh.world.rank == 0 else None
        together(lambda: load_stage(stage, config.model, shown), mesh.world)
    if config.pack_experts:
        for moe in stage.moe_layers().values():
            moe.experts.pack_base()
    stage.train()
    experts: Mapping[int, tuple[int, ...]] | None = resumed.experts if resumed is not None else None
    if resumed is None and config.selection is not None:
        experts = select_experts(config, config.selection, documents, stage)
        if mesh.world.rank == 0:
            logger.info("experts chosen: %s", _described(experts, base.n_routed_experts))
    if experts is not None:
        _keep_experts(stage, experts)
    parameters = stage.lora_parameters()
    initialise(parameters, mesh, config.lora.init, config.seed)
    check_replicas(parameters, mesh, step=0)
    return TrainedModel(stage, parameters, experts)


def _keep_experts(stage: TrainingStage, experts: ExpertsOfLayers) -> None:
    for layer, moe in stage.moe_layers().items():
        moe.experts.set_factors(moe.experts.spec, experts.get(layer, ()))


def _described(experts: ExpertsOfLayers, num_experts: int) -> str:
    share = sum(map(len, experts.values())) / max(1, num_experts * len(experts))
    layers = ", ".join(f"layer {layer}: {len(chosen)}" for layer, chosen in experts.items())
    return f"{share:.1%} of all ({layers})"
