"""A run as planned, for `graft train --dry-run` and for counting its work: every trainable tensor, memory, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import TrainConfig
from runtime.trainer.load import disk_shapes
from runtime.trainer.lora import LoraSpec
from runtime.trainer.loss import MAX_LOGITS
from runtime.trainer.report.activations import activation_bytes, logit_bytes
from runtime.trainer.report.flops import LoraSize, base_parameters, expert_share, step_flops
from runtime.trainer.selection import ExpertsOfLayers
from runtime.trainer.stage import split_layers
from runtime.trainer.step_data import row_width
from runtime.trainer.targets import is_routed, resolve_targets

MASTER_BYTES = 4  # of a LoRA parameter in fp32: the master weight, its gradient, and Adam's m and v
COMPUTE_BYTES = {"bfloat16": 2, "float32": 4}
_ROW_SPLIT = ("o_proj", "down_proj")
_SPLIT = ("_proj.weight", "embed_tokens.weight", "lm_head.weight")
_REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class TensorInfo:
    """One trainable tensor at its full size.

    `kind`: its module without the layer, and the factor ("self_attn.q_b_proj A"). `num_shards`: processes of one
    pipeline stage that share its parameters, 1 if each holds them all. `active_share`: of its parameters, how many one
    token passes through (top-k / experts for the factors of routed experts).
    """

    kind: str
    layer: int | None
    shape: tuple[int, ...]
    lora_rank: int
    pp_stage: int = 0
    num_shards: int = 1
    active_share: float = 1.0

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StageInfo:
    """What one process of a pipeline stage holds besides LoRA; activations at the peak, with and without checkpointing.

    `base_parameters`: those of the frozen base on one process; `packed_parameters`: those of them that it holds twice.
    """

    layers: tuple[int, ...]
    base_parameters: int
    activation_bytes: int
    checkpointed_bytes: int
    packed_parameters: int = 0


@dataclass(frozen=True)
class RunPlan:
    """A run as planned. `base_parameters` is the whole base; `step_flops` is over all processes."""

    tensors: Sequence[TensorInfo]
    stages: Sequence[StageInfo]
    base_parameters: int
    dtype: str
    checkpointing: bool
    num_processes: int
    tokens_per_step: int
    step_flops: float


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of one process by use. `copies`: LoRA factors in the compute dtype, 0 where that is fp32."""

    base: int
    master: int
    gradients: int
    moments: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.master + self.gradients + self.moments + self.copies + self.activations


def tensor_infos(base: DeepseekConfig, config: TrainConfig, experts: ExpertsOfLayers | None) -> list[TensorInfo]:
    """Every trainable tensor at its full size; `experts` None: all experts of a layer."""
    stages = split_layers(base.num_hidden_layers, config.parallel.pp, config.parallel.layers)
    found: list[TensorInfo] = []
    for module, spec in resolve_targets(base, config.lora, config.seed).items():
        layer = int(module.split(".")[2]) if module.startswith("model.layers.") else None
        stage = config.parallel.pp - 1 if layer is None else next(n for n, own in enumerate(stages) if layer in own)
        if is_routed(module) and layer is not None:
            num_experts = base.n_routed_experts if experts is None else len(experts.get(layer, ()))
            found += _expert_infos(base, config, layer, stage, spec, num_experts)
        else:
            found += _linear_infos(base, config, module, layer, stage, spec)
    return found


def plan_run(base: DeepseekConfig, config: TrainConfig, tokens_per_row: float, targets_per_row: float) -> RunPlan:
    """The run before anything is loaded; rows are taken to hold one document of `tokens_per_row` each."""
    parallel = config.parallel
    tensors = tensor_infos(base, config, None)
    layers = split_layers(base.num_hidden_layers, parallel.pp, parallel.layers)
    lengths = [max(1, round(tokens_per_row))] * config.batch_rows
    num_targets = round(targets_per_row * config.batch_rows)
    return RunPlan(
        tensors,
        [_stage_info(base, config, stage, own, targets_per_row) for stage, own in enumerate(layers)],
        base_parameters(base),
        config.dtype,
        config.activation_checkpointing,
        parallel.num_processes,
        sum(lengths),
        step_flops(base, lengths, num_targets, LoraSize.of(tensors)),
    )


def process_memory(plan: RunPlan, stage: int, *, checkpointing: bool) -> ProcessMemory:
    """Bytes of one process of a stage; a tensor that does not divide evenly is counted at the larger share."""
    info = plan.stages[stage]
    own = sum(-(-tensor.num_parameters // tensor.num_shards) for tensor in plan.tensors if tensor.pp_stage == stage)
    compute = COMPUTE_BYTES[plan.dtype]
    return ProcessMemory(
        base=(info.base_parameters + info.packed_parameters) * compute,
        master=own * MASTER_BYTES,
        gradients=own * MASTER_BYTES,
        moments=2 * own * MASTER_BYTES,
        copies=0 if compute == MASTER_BYTES else own * compute,
        activations=info.checkpointed_bytes if checkpointing else info.activation_bytes,
    )


def _linear_infos(
    base: DeepseekConfig, config: TrainConfig, module: str, layer: int | None, stage: int, spec: LoraSpec
) -> list[TensorInfo]:
    out_features, in_features = base.linear_shapes()[module]
    leaf = module.rpartition(".")[2]
    kind = ".".join(module.split(".")[3:]) if layer is not None else module
    tp = config.parallel.tp
    shards_a = tp if leaf in _ROW_SPLIT else 1
    shards_b = 1 if leaf in (*_ROW_SPLIT, *_REPLICATED) else tp
    return [
        TensorInfo(f"{kind} A", layer, (spec.rank, in_features), spec.rank, stage, shards_a),
        TensorInfo(f"{kind} B", layer, (out_features, spec.rank), spec.rank, stage, shards_b),
    ]


def _expert_infos(
    base: DeepseekConfig, config: TrainConfig, layer: int, stage: int, spec: LoraSpec, num_experts: int
) -> list[TensorInfo]:
    hidden, width, rank = base.hidden_size, base.moe_intermediate_size, spec.rank
    shapes = (("gate_up_proj A", rank, hidden), ("gate_up_proj B", 2 * width, rank),
              ("down_proj A", rank, width), ("down_proj B", hidden, rank))  # fmt: skip
    ep, share = config.parallel.expert_size, expert_share(base)
    return [
        TensorInfo(f"mlp.experts.{kind}", layer, (num_experts, *shape), rank, stage, ep, share)
        for kind, *shape in shapes
    ]


def _stage_info(
    base: DeepseekConfig, config: TrainConfig, stage: int, layers: range, targets_per_row: float
) -> StageInfo:
    parallel = config.parallel
    is_last = stage == parallel.pp - 1
    num_tokens = config.micro_batch_rows * row_width(config)
    in_flight = min(config.num_micro_batches, parallel.pp - stage)
    logits = 0
    if is_last:
        at_once = MAX_LOGITS * parallel.tp // base.vocab_size
        logits = logit_bytes(base, min(at_once, round(config.micro_batch_rows * targets_per_row)), parallel.tp)
    both = [
        activation_bytes(
            base,
            layers,
            num_tokens,
            element_bytes=COMPUTE_BYTES[config.dtype],
            checkpointing=checkpointing,
            num_in_flight=in_flight,
            tensor_shards=parallel.tp,
            expert_shards=parallel.tp,
        )
        + logits
        for checkpointing in (False, True)
    ]
    packs = config.pack_experts and config.device == "cpu" and config.dtype == "bfloat16"
    packed = _expert_parameters_of(base, config, layers) if packs else 0
    return StageInfo(tuple(layers), _base_parameters_of(base, config, stage, layers), both[0], both[1], packed)


def _expert_parameters_of(base: DeepseekConfig, config: TrainConfig, layers: range) -> int:
    """Parameters of the routed experts on one process of a stage."""
    num_layers = sum(base.is_moe_layer(layer) for layer in layers)
    one = 3 * base.hidden_size * base.moe_intermediate_size
    return num_layers * base.n_routed_experts * one // config.parallel.expert_size


def _base_parameters_of(base: DeepseekConfig, config: TrainConfig, stage: int, layers: range) -> int:
    """Frozen parameters on one process of a stage; a tied head is a second copy of the embedding, in the last one."""
    parallel = config.parallel
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    total = 0
    for name, shape in disk_shapes(base).items():
        is_outer = not name.startswith("model.layers.")
        at_start, at_end = name.startswith("model.embed"), name.startswith(("model.norm", "lm_head"))
        here = (at_start and stage == 0) or (at_end and stage == parallel.pp - 1) if is_outer else False
        if not (here or name.startswith(prefixes)):
            continue
        size = math.prod(shape)
        if ".mlp.experts." in name:
            size //= parallel.expert_size
        elif name.endswith(_SPLIT) and not any(leaf in name for leaf in _REPLICATED):
            size //= parallel.tp
        total += size
    if base.tie_word_embeddings and stage == parallel.pp - 1:
        total += base.vocab_size * base.hidden_size // parallel.tp
    return total
