"""The DeepSeek decoder: embeddings, layers of latent attention and (mixture of) experts, norm and head."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from loaders.base import TensorSpec, plan_base
from runtime.layers.linear import Linear
from runtime.layers.lora_site import StepLora
from runtime.layers.mlp import GatedMlp
from runtime.layers.norm import RmsNorm
from runtime.layers.placement import Placement
from runtime.models.deepseek.attention import MultiHeadLatentAttention
from runtime.models.deepseek.attention_batch import AttentionBatch
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.moe import MixtureOfExperts, RoutedExperts
from runtime.models.deepseek.rope import inverse_frequencies, rotary_scale, rotation_at
from runtime.ops.latent_cache import LatentCache
from runtime.ops.rotation import Rotation

logger = logging.getLogger(__name__)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual."""

    def __init__(self, layer: int, config: DeepseekConfig, placement: Placement) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.self_attn = MultiHeadLatentAttention(f"{name}.self_attn", config, placement)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.mlp: MixtureOfExperts | GatedMlp
        if config.is_moe_layer(layer):
            self.mlp = MixtureOfExperts(layer, config, placement)
        else:
            self.mlp = GatedMlp(f"{name}.mlp", config.hidden_size, config.intermediate_size, placement)

    def forward(
        self,
        x_TH: Tensor,
        residual_TH: Tensor | None,
        rotation: Rotation,
        cache: LatentCache,
        batch: AttentionBatch,
        lora: StepLora | None,
    ) -> tuple[Tensor, Tensor]:
        """What the layer before adds [T, H] and what it adds to (None before the first) -> the same of this layer."""
        x_TH, residual_TH = self.input_layernorm.add(x_TH, residual_TH)
        x_TH = self.self_attn(x_TH, rotation, cache, batch, lora)
        x_TH, residual_TH = self.post_attention_layernorm.add(x_TH, residual_TH)
        return self.mlp(x_TH, lora), residual_TH


class DeepseekModel(nn.Module):
    """The whole decoder; `forward` takes one step's tokens of all sequences, flat."""

    def __init__(self, config: DeepseekConfig, placement: Placement) -> None:
        super().__init__()
        self.config = config
        self.placement = placement
        self.embed_tokens = placement.empty(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(layer, config, placement) for layer in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.lm_head = Linear("lm_head", config.hidden_size, config.vocab_size, placement)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens
        self.inverse_frequencies = inverse_frequencies(config).to(placement.device)
        self.rotary_scale = rotary_scale(config)

    def forward(
        self, token_ids_T: Tensor, caches: list[LatentCache], batch: AttentionBatch, lora: StepLora | None
    ) -> Tensor:
        """Token ids [T] -> normed hidden states [T, H]; `caches` holds one for each layer."""
        x_TH = torch.nn.functional.embedding(token_ids_T, self.embed_tokens)
        residual_TH: Tensor | None = None
        rotation = rotation_at(batch.positions_T, self.inverse_frequencies, self.rotary_scale)
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TH, residual_TH = layer(x_TH, residual_TH, rotation, cache, batch, lora)
        normed_TH, _ = self.norm.add(x_TH, residual_TH)
        return normed_TH

    def logits(self, hidden_BH: Tensor, rows_B: Tensor, lora: StepLora | None) -> Tensor:
        """Logits [B, vocabulary] in float32 of the hidden states of the step's tokens `rows_B`."""
        logits = self.placement.ops.linear(hidden_BH, self.lm_head.weight)
        if lora is not None:
            lora.add_linear_of_rows_("lm_head", logits, hidden_BH, rows_B)
        return logits.float()

    def destinations(self) -> dict[str, Tensor]:
        """Name on disk -> the memory that its tensor goes to (for experts a 3-D view into their panels)."""
        named: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embed_tokens,
            "model.norm.weight": self.norm.weight,
        }
        if not self.config.tie_word_embeddings:
            named["lm_head.weight"] = self.lm_head.weight
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            for name, parameter in layer.named_parameters():
                if (name.endswith(".weight") and ".experts." not in name) or name.endswith("correction_bias"):
                    named[prefix + name] = parameter
            for module in layer.modules():
                if isinstance(module, RoutedExperts):
                    named |= _expert_destinations(f"{prefix}mlp.experts", module)
        return named


def load_model(
    model_dir: Path,
    config: DeepseekConfig,
    placement: Placement,
    progress: Callable[[int, int], None] | None = None,
) -> DeepseekModel:
    """Build the model and fill it tensor by tensor; raises CheckpointError with every problem of the files."""
    model = DeepseekModel(config, placement)
    destinations = model.destinations()
    specs = {
        name: TensorSpec(_disk_shape(tensor), keep_float32=name.endswith("e_score_correction_bias"))
        for name, tensor in destinations.items()
    }
    plan = plan_base(model_dir, specs, ignored_layers_from=config.num_hidden_layers)
    for name, reason in plan.report.skipped:
        logger.info("skipped %s: %s", name, reason)
    with torch.no_grad():
        for name, tensor in plan.stream(placement.dtype, progress):
            destinations[name].copy_(tensor.view(destinations[name].shape))
        destinations.clear()  # packing replaces weights, and those that were loaded are not to be kept
        for module in model.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.absorb_weights()
        for module in model.modules():
            if isinstance(module, Linear) and module.weight is not model.embed_tokens:
                module.pack_weight()
    return model


def _expert_destinations(prefix: str, experts: RoutedExperts) -> dict[str, Tensor]:
    """Views [panels, columns, in] of each expert's weights; read in that order they are the rows [out, in] on disk."""
    named = {}
    for index in range(experts.w13.shape[0]):
        gate_up = experts.w13[index].transpose(1, 2)
        gate, up = gate_up.chunk(2, dim=1 if gate_up.shape[0] == 1 else 0)
        named[f"{prefix}.{index}.gate_proj.weight"] = gate
        named[f"{prefix}.{index}.up_proj.weight"] = up
        named[f"{prefix}.{index}.down_proj.weight"] = experts.w2[index].transpose(1, 2)
    return named


def _disk_shape(destination: Tensor) -> tuple[int, ...]:
    if destination.dim() == 3:
        panels, columns, in_features = destination.shape
        return panels * columns, in_features
    return tuple(destination.shape)
