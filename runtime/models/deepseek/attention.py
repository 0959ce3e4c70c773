"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a latent row per token is cached, not keys and values.

Shape suffixes: T tokens of the step, B decoding rows, H heads, N nope width, D rope width, V value width,
C latent width (kv_lora_rank), X = C + D, L context length.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from runtime.layers.linear import Linear
from runtime.layers.lora_site import StepLora
from runtime.layers.norm import RmsNorm
from runtime.layers.placement import Placement
from runtime.models.deepseek.attention_batch import AttentionBatch, PrefillSpan
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.rope import softmax_scale
from runtime.ops.latent_cache import LatentCache
from runtime.ops.mla_weights import MlaWeights, QueryLatent
from runtime.ops.reference import merge_blocks
from runtime.ops.rotation import Rotation

MIN_BLOCK_KEYS = 64
# The norms inside attention have this eps in DeepSeek's code, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """Decoding absorbs kv_b into query and output (`_decode`); prefill expands keys and values (`_prefill`)."""

    key_up_HNC: Tensor
    value_up_HCV: Tensor

    def __init__(self, name: str, config: DeepseekConfig, placement: Placement) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.num_latent = config.kv_lora_rank
        self.scale = softmax_scale(config)
        self.ops = placement.ops

        def projection(leaf: str) -> Linear:
            out_features, in_features = shapes[f"{name}.{leaf}"]
            return Linear(f"{name}.{leaf}", in_features, out_features, placement)

        shapes = config.linear_shapes()
        self.has_query_latent = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = projection("q_proj")
        else:
            self.q_a_proj = projection("q_a_proj")
            self.q_a_layernorm = RmsNorm(config.q_lora_rank, LATENT_NORM_EPS, placement)
            self.q_b_proj = projection("q_b_proj")
        self.kv_a_proj_with_mqa = projection("kv_a_proj_with_mqa")
        self.kv_a_layernorm = RmsNorm(config.kv_lora_rank, LATENT_NORM_EPS, placement)
        self.kv_b_proj = projection("kv_b_proj")
        self.o_proj = projection("o_proj")
        self.input_modules = [
            f"{name}.{leaf}"
            for leaf in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
            if f"{name}.{leaf}" in shapes
        ]
        # kv_b once more, head by head: a view of it would be copied for every product of every step.
        key_up_HNC = placement.empty(self.num_heads, self.nope, self.num_latent)
        value_up_HCV = placement.empty(self.num_heads, self.num_latent, self.value)
        self.register_buffer("key_up_HNC", key_up_HNC.data, persistent=False)
        self.register_buffer("value_up_HCV", value_up_HCV.data, persistent=False)

    def absorb_weights(self) -> None:
        """Once the weights are loaded: fill what decoding multiplies by, and lay its projections out for the device."""
        weight_HOC = self.kv_b_proj.weight.view(self.num_heads, self.nope + self.value, self.num_latent)
        key_up_HNC, value_up_HVC = weight_HOC.split((self.nope, self.value), dim=1)
        self.key_up_HNC.copy_(key_up_HNC)
        self.value_up_HCV.copy_(value_up_HVC.transpose(1, 2))
        packed = self.ops.pack_mla(self._input_weights())
        self._query_up.weight = nn.Parameter(packed.query_up_OR, requires_grad=False)
        self.kv_a_proj_with_mqa.weight = nn.Parameter(packed.kv_down_XK, requires_grad=False)
        if packed.query_latent is not None:
            self.q_a_proj.weight = nn.Parameter(packed.query_latent.down_RK, requires_grad=False)

    @property
    def _query_up(self) -> Linear:
        return self.q_b_proj if self.has_query_latent else self.q_proj

    def _input_weights(self) -> MlaWeights:
        latent = None
        if self.has_query_latent:
            latent = QueryLatent(self.q_a_proj.weight, self.q_a_layernorm.weight)
        norm = self.kv_a_layernorm
        return MlaWeights(
            latent, self._query_up.weight, self.key_up_HNC, self.kv_a_proj_with_mqa.weight, norm.weight, norm.eps
        )

    def forward(
        self,
        x_TK: Tensor,
        rotation: Rotation,
        cache: LatentCache,
        batch: AttentionBatch,
        lora: StepLora | None,
    ) -> Tensor:
        """[T, hidden] -> [T, hidden]; writes the step's latents into the layer's cache first."""
        if not batch.prefills and (lora is None or not lora.adapts(self.input_modules)):
            queries = self.ops.decode_queries(x_TK, self._input_weights(), rotation, cache, batch.write_slots_T)
            latent_THC = self.ops.mla_decode(*queries, cache, batch.decode_context, self.scale)
            plain_TK: Tensor = self.o_proj(self._values(latent_THC).flatten(1), lora)
            return plain_TK
        query_nope, query_rope = self._queries(x_TK, lora).split((self.nope, self.rope), dim=-1)
        query_rope = self.ops.rotate_interleaved(query_rope, rotation)
        kv_TX = self.kv_a_proj_with_mqa(x_TK, lora)
        norm = self.kv_a_layernorm
        self.ops.write_latents(cache, kv_TX, norm.weight, norm.eps, rotation, batch.write_slots_T)

        if not batch.prefills:
            out_THV = self._decode(query_nope, query_rope, cache, batch, lora)
        else:
            out_THV = x_TK.new_empty(x_TK.shape[0], self.num_heads, self.value)
            for span in batch.prefills:
                rows = slice(span.start, span.stop)
                out_THV[rows] = self._prefill(query_nope[rows], query_rope[rows], cache, span, lora)
            if batch.decode_rows:
                rows_B = batch.decode_rows_B
                out_THV[rows_B] = self._decode(query_nope[rows_B], query_rope[rows_B], cache, batch, lora)
        out_TK: Tensor = self.o_proj(out_THV.flatten(1), lora)
        return out_TK

    def _queries(self, x_TK: Tensor, lora: StepLora | None) -> Tensor:
        query: Tensor
        if self.has_query_latent:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TK, lora)), lora)
        else:
            query = self.q_proj(x_TK, lora)
        return query.view(-1, self.num_heads, self.nope + self.rope)

    def _decode(
        self, query_nope: Tensor, query_rope: Tensor, cache: LatentCache, batch: AttentionBatch, lora: StepLora | None
    ) -> Tensor:
        """One query a sequence: q (W_UK c) = (q W_UK) c, so scores and outputs are taken on the latents themselves.

        A LoRA on kv_b changes W_UK and W_UV, so it is applied inside both products, factored at its rank.
        """
        query_HBC = torch.bmm(query_nope.transpose(0, 1), self.key_up_HNC)
        query_BHC = query_HBC.transpose(0, 1).contiguous()
        factors = lora.factors_of_rows(self.kv_b_proj.name, batch.decode_rows) if lora is not None else []
        for rows, a_CR, b_RO in factors:
            b_RHN = b_RO.view(-1, self.num_heads, self.nope + self.value)[..., : self.nope]
            query_BHC[rows] += torch.einsum("bhn,rhn->bhr", query_nope[rows], b_RHN) @ a_CR.T
        latent_BHC = self.ops.mla_decode(query_BHC, query_rope, cache, batch.decode_context, self.scale)
        out_BHV = self._values(latent_BHC)
        for rows, a_CR, b_RO in factors:
            b_RHV = b_RO.view(-1, self.num_heads, self.nope + self.value)[..., self.nope :]
            out_BHV[rows] += torch.einsum("bhr,rhv->bhv", latent_BHC[rows] @ a_CR, b_RHV)
        return out_BHV

    def _values(self, latent_BHC: Tensor) -> Tensor:
        return torch.bmm(latent_BHC.transpose(0, 1), self.value_up_HCV).transpose(0, 1)

    def _prefill(
        self, query_THN: Tensor, query_THD: Tensor, cache: LatentCache, span: PrefillSpan, lora: StepLora | None
    ) -> Tensor:
        """A chunk of one sequence over its context, block by block of keys, then over itself: memory is bounded."""
        num_queries = span.stop - span.start
        num_context = len(span.slots_L) - num_queries
        width = self.nope + self.rope + self.value
        if self.ops.holds_scores:
            width = max(num_queries, width)
        block = max(MIN_BLOCK_KEYS, self.ops.max_block_numbers // (self.num_heads * width))
        edges = [*range(0, num_context, block), num_context]

        def attend(start: int, stop: int, *, causal: bool) -> tuple[Tensor, Tensor]:
            expanded = self._expand(*cache.read(span.slots_L[start:stop]), span.sequence, lora)
            return self.ops.attend_block(query_THN, query_THD, *expanded, self.scale, causal=causal)

        merged = attend(num_context, num_context + num_queries, causal=True)
        for start, stop in pairwise(edges):
            merged = merge_blocks(*merged, *attend(start, stop, causal=False))
        return merged[0].to(query_THN.dtype)

    def _expand(
        self, latent_LC: Tensor, key_LD: Tensor, sequence: int, lora: StepLora | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [L, H, N], their rotated part [L, D] and values [L, H, V] of cached rows: the readable form of MLA."""
        expanded = self.ops.linear(latent_LC, self.kv_b_proj.weight)
        if lora is not None:
            lora.add_linear_of_sequence_(self.kv_b_proj.name, expanded, latent_LC, sequence)
        heads_LHO = expanded.view(-1, self.num_heads, self.nope + self.value)
        key_LHN, value_LHV = heads_LHO.split((self.nope, self.value), dim=-1)
        return key_LHN, key_LD, value_LHV
