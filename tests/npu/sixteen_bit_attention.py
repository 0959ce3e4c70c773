"""Ascend's back-end at its most exact: float32, but for attention on the cache, whose operators take 16 bits only."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.npu.attention import rotate_interleaved
from runtime.ops.npu.norms import rms_norm
from runtime.ops.rotation import Rotation
from tests.npu.held_choice import HeldNpu

HALF = torch.bfloat16


class _HalfCache(LatentCache):
    """In bfloat16; what prefill expands of it is float32."""

    def read(self, slots_L: Tensor) -> tuple[Tensor, Tensor]:
        latent_LC, key_LD = super().read(slots_L)
        return latent_LC.float(), key_LD.float()


class SixteenBitAttention(HeldNpu):
    """A float32 model whose latent cache, and the attention that reads it, is in bfloat16."""

    def make_cache(
        self, num_slots: int, block_tokens: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> LatentCache:
        return _HalfCache.apart(num_slots, block_tokens, widths, HALF, device)

    def write_latents(
        self,
        cache: LatentCache,
        kv_TX: Tensor,
        norm_weight_C: Tensor,
        eps: float,
        rotation: Rotation,
        slots_T: Tensor,
    ) -> None:
        latent_TC, rope_TD = kv_TX.split((cache.latent_SC.shape[1], cache.rope_SD.shape[1]), dim=-1)
        normed_TC = rms_norm(latent_TC.contiguous(), norm_weight_C, eps)
        cache.write_(slots_T, normed_TC.to(HALF), rotate_interleaved(rope_TD, rotation).to(HALF))

    def mla_decode(
        self, query_BHC: Tensor, query_BHD: Tensor, cache: LatentCache, context: DecodeContext, scale: float
    ) -> Tensor:
        return super().mla_decode(query_BHC.to(HALF), query_BHD.to(HALF), cache, context, scale).to(query_BHC.dtype)

    def attend_block(
        self,
        query_THN: Tensor,
        query_THD: Tensor,
        key_LHN: Tensor,
        key_LD: Tensor,
        value_LHV: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        halves = [tensor.to(HALF) for tensor in (query_THN, query_THD, key_LHN, key_LD, value_LHV)]
        return super().attend_block(*halves, scale, causal=causal)
