"""One process's part of the model in training: the layers of its pipeline stage, split as the mesh says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.distributed.collectives import enter_parallel, leave_parallel
from runtime.distributed.mesh import Mesh, MeshShape
from runtime.layers.norm import RmsNorm
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.rope import inverse_frequencies, rotary_scale, rotation_at
from runtime.ops.rotation import Rotation
from runtime.trainer.attention import TrainingAttention
from runtime.trainer.config import ParallelConfig, RoutingConfig
from runtime.trainer.lora import LoraGroupedExperts, LoraParallelLinear, LoraSpec, Split
from runtime.trainer.loss import TargetLosses, target_losses
from runtime.trainer.micro_batch import MicroBatch
from runtime.trainer.mlp import LoraGatedMlp
from runtime.trainer.moe import TrainingMoe
from runtime.trainer.norm import frozen_rms_norm
from runtime.trainer.parameters import LoraParameter


@dataclass(frozen=True)
class StageOptions:
    """What a stage needs beside the base's shape. `specs`: the LoRA of each adapted module by its full name."""

    layers: range
    specs: Mapping[str, LoraSpec]
    routing: RoutingConfig
    activation_checkpointing: bool = False


class TrainingLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual."""

    def __init__(
        self, layer: int, config: DeepseekConfig, placement: Placement, mesh: Mesh, options: StageOptions
    ) -> None:
        super().__init__()
        self.tp = mesh.tp
        name = f"model.layers.{layer}"
        specs = options.specs
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.self_attn = TrainingAttention(f"{name}.self_attn", config, placement, mesh.tp, specs)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.mlp: TrainingMoe | LoraGatedMlp
        if config.is_moe_layer(layer):
            self.mlp = TrainingMoe(layer, config, placement, mesh, specs, options.routing)
        else:
            self.mlp = LoraGatedMlp(f"{name}.mlp", config, placement, mesh.tp, specs)

    def forward(self, x_TH: Tensor, rotation: Rotation, batch: MicroBatch) -> Tensor:
        """[T, H] -> [T, H]."""
        x_TH = x_TH + self.self_attn(frozen_rms_norm(x_TH, self.input_layernorm), rotation, batch)
        normed_TH = frozen_rms_norm(x_TH, self.post_attention_layernorm)
        if isinstance(self.mlp, TrainingMoe):
            mlp_TH: Tensor = self.mlp(normed_TH, batch)
        else:
            mlp_TH = leave_parallel(self.mlp(enter_parallel(normed_TH, self.tp), batch.ids_T), self.tp)
        return x_TH + mlp_TH


class TrainingStage(nn.Module):
    """The first stage embeds, the last one has norm, head and loss; every stage has its layers."""

    def __init__(self, config: DeepseekConfig, placement: Placement, mesh: Mesh, options: StageOptions) -> None:
        super().__init__()
        self.config, self.placement, self.mesh, self.options = config, placement, mesh, options
        self.is_first, self.is_last = mesh.pp.rank == 0, mesh.pp.rank == mesh.pp.size - 1
        vocab, hidden = config.vocab_size, config.hidden_size
        if self.is_first:
            self.embed_tokens = placement.empty(vocab // mesh.tp.size, hidden)
        self.layers = nn.ModuleDict(
            {str(layer): TrainingLayer(layer, config, placement, mesh, options) for layer in options.layers}
        )
        if self.is_last:
            self.norm = RmsNorm(hidden, config.rms_norm_eps, placement)
            spec = options.specs.get("lm_head")
            self.lm_head = LoraParallelLinear("lm_head", (vocab, hidden), Split.COLUMN, placement, mesh.tp, spec)
        self.inverse_frequencies = inverse_frequencies(config).to(placement.device)
        self.rotary_scale = rotary_scale(config)

    def hidden(self, x_TH: Tensor | None, batch: MicroBatch) -> Tensor:
        """Through this stage's layers: [T, H] from the stage before, None in the first one -> [T, H]."""
        if x_TH is None:
            x_TH = self._embedded(batch.token_ids_T)
            # Alone, nothing below the first factor needs a gradient. Processes that exchange rows or stages must all
            # go the same way back, also one whose experts or layers have nothing to train.
            if self.mesh.pp.size > 1 or self.mesh.ep.size > 1:
                x_TH.requires_grad_(torch.is_grad_enabled())
        rotation = rotation_at(batch.positions_T, self.inverse_frequencies, self.rotary_scale)
        for layer in self.layers.values():
            if self.options.activation_checkpointing and self.training:
                x_TH = checkpoint(layer, x_TH, rotation, batch, use_reentrant=False)
            else:
                x_TH = layer(x_TH, rotation, batch)
        return x_TH

    def losses(self, hidden_TH: Tensor, batch: MicroBatch) -> TargetLosses:
        """Of the last stage's hidden states: the loss of every token that is learnt."""
        return target_losses(frozen_rms_norm(hidden_TH, self.norm), self.lm_head, batch, self.mesh.tp)

    def logits(self, hidden_TH: Tensor, batch: MicroBatch) -> Tensor:
        """Of the last stage's hidden states: this process's part of the vocabulary's logits, [T, V] float32."""
        logits: Tensor = self.lm_head(frozen_rms_norm(hidden_TH, self.norm), batch.ids_T)
        return logits.float()

    def _embedded(self, token_ids_T: Tensor) -> Tensor:
        tp, num_here = self.mesh.tp, self.embed_tokens.shape[0]
        if tp.size == 1:
            return torch.nn.functional.embedding(token_ids_T, self.embed_tokens)
        local_T = token_ids_T - num_here * tp.rank
        is_here_T = (local_T >= 0) & (local_T < num_here)
        part_TH = torch.nn.functional.embedding(local_T.clamp(0, num_here - 1), self.embed_tokens)
        return leave_parallel(part_TH * is_here_T[:, None], tp)

    def moe_layers(self) -> dict[int, TrainingMoe]:
        """Layer index -> mixture of experts, of this stage."""
        moes = {int(index): layer.mlp for index, layer in self.layers.items()}
        return {index: moe for index, moe in moes.items() if isinstance(moe, TrainingMoe)}

    def lora_parameters(self) -> list[LoraParameter]:
        """All trainable factors of this process, in an order that all its replicas share."""
        found: list[LoraParameter] = []
        for module in self.modules():
            if isinstance(module, LoraParallelLinear | LoraGroupedExperts):
                found += module.lora_parameters()
        return found


def mesh_shape(parallel: ParallelConfig) -> MeshShape:
    """The sizes of a configuration as the mesh takes them."""
    return MeshShape(parallel.pp, parallel.dp, parallel.tp, parallel.expert_size)


def split_layers(num_layers: int, pp_size: int, explicit: Iterable[int] | None) -> list[range]:
    """The layers of each stage; shares differ by one at most unless given. Raises ValueError if they do not add up."""
    base, extra = divmod(num_layers, pp_size)
    counts = list(explicit) if explicit is not None else [base + (stage < extra) for stage in range(pp_size)]
    if sum(counts) != num_layers or min(counts) < 1:
        raise ValueError(
            f"parallel.layers = {counts} is not allowed: {pp_size} numbers from 1 that add up to {num_layers} layers"
        )
    starts = [sum(counts[:stage]) for stage in range(pp_size)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
