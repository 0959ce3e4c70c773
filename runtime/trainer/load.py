"""Fill a stage with its part of the base: every tensor is checked, streamed once, and cut to what lies here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loaders.base import TensorSpec, plan_base
from runtime.distributed.mesh import Mesh
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.lora import LoraGroupedExperts, LoraParallelLinear
from runtime.trainer.moe import TrainingMoe
from runtime.trainer.parameters import shard
from runtime.trainer.stage import TrainingStage

Destination = Callable[[Tensor], object]


def load_stage(stage: TrainingStage, model_dir: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Read the base into the stage; raises CheckpointError with every problem of the files."""
    config, placement = stage.config, stage.placement
    specs = {
        name: TensorSpec(shape, keep_float32=name.endswith("e_score_correction_bias"))
        for name, shape in disk_shapes(config).items()
    }
    plan = plan_base(model_dir, specs, ignored_layers_from=config.num_hidden_layers)
    destinations = _destinations(stage)
    with torch.no_grad():
        for name, tensor in plan.stream(placement.dtype, progress, destinations.__contains__):
            for write in destinations[name]:
                write(tensor)


def disk_shapes(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape of every tensor of the base."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in config.linear_shapes().items()}
    hidden, width, num_experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shapes["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.kv_a_layernorm.weight"] = (config.kv_lora_rank,)
        if config.q_lora_rank is not None:
            shapes[f"{prefix}.self_attn.q_a_layernorm.weight"] = (config.q_lora_rank,)
        if not config.is_moe_layer(layer):
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = (num_experts, hidden)
        if config.topk_method == "noaux_tc":
            shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (num_experts,)
        for expert in range(num_experts):
            name = f"{prefix}.mlp.experts.{expert}"
            shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, hidden)
            shapes[f"{name}.down_proj.weight"] = (hidden, width)
    return shapes


def _destinations(stage: TrainingStage) -> dict[str, list[Destination]]:
    found: dict[str, list[Destination]] = {}
    embedding = "model.embed_tokens.weight"
    if stage.is_first:
        found[embedding] = [_part(stage.embed_tokens, 0, stage.mesh)]
    for name, module in stage.named_modules():
        if isinstance(module, LoraParallelLinear):
            on_disk = f"{module.name}.weight"
            if module.name == "lm_head" and stage.config.tie_word_embeddings:
                on_disk = embedding
            found.setdefault(on_disk, []).append(_part(module.base.weight, module.split.value, stage.mesh))
        elif isinstance(module, TrainingMoe):
            found |= _moe_destinations(f"model.{name}", module)
        elif name.endswith("norm"):
            found[f"model.{name}.weight"] = [_part(module.weight, None, stage.mesh)]
    return found


def _moe_destinations(name: str, moe: TrainingMoe) -> dict[str, list[Destination]]:
    found: dict[str, list[Destination]] = {f"{name}.gate.weight": [moe.gate.weight.copy_]}
    if hasattr(moe.gate, "e_score_correction_bias"):
        found[f"{name}.gate.e_score_correction_bias"] = [moe.gate.e_score_correction_bias.copy_]
    experts: LoraGroupedExperts = moe.experts
    width = experts.widths[1]
    for index, expert in enumerate(experts.experts):
        prefix = f"{name}.experts.{expert}"
        found[f"{prefix}.gate_proj.weight"] = [experts.w13[index, :width].copy_]
        found[f"{prefix}.up_proj.weight"] = [experts.w13[index, width:].copy_]
        found[f"{prefix}.down_proj.weight"] = [experts.w2[index].copy_]
    return found


def _part(target: Tensor, dim: int | None, mesh: Mesh) -> Destination:
    def write(full: Tensor) -> None:
        target.copy_(shard(full, dim, mesh.tp))

    return write
