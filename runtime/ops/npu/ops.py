"""The operation table of an Ascend NPU; what each entry does stands in the module of its subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.ops.base import Ops
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.lora_rows import LoraRows
from runtime.ops.mla_weights import MlaWeights
from runtime.ops.npu import attention, grouped, norms, prolog, routing, training
from runtime.ops.rotation import Rotation
from runtime.ops.routing import RoutingRule, SortedRows


class NpuOps(Ops):
    """Grouped products by `npu_grouped_matmul`; nothing here waits for the device."""

    lora_rank_multiple = 16  # the cube cores' tile
    lora_a_rows_first = True  # so that a product with A reads long rows
    max_block_numbers = 2**27  # 256 MiB of keys and values: 3,276 of them for 128 heads
    holds_scores = False

    def __init__(self, *, mla_prolog: bool = True) -> None:
        """`mla_prolog`: whether MLA's projections may be one operator where their sizes are its own."""
        self._mla_prolog = mla_prolog

    def grouped_matmul(self, x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_matmul`."""
        return grouped.grouped_matmul(x_MK, weight_GJKW[:, 0], counts_G)

    def grouped_outer(self, x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_outer`."""
        return grouped.grouped_outer(x_MK, y_MN, counts_G)

    def lora_add_(self, y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], lora: LoraRows) -> None:
        """See `Ops.lora_add_`."""
        grouped.lora_add_(y_MN, x_MK, a_PKR, bs_PRN, lora)

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        """See `Ops.choose_experts`."""
        return routing.choose_experts(logits_TE, bias_E, rule)

    def sort_rows(self, x_TH: Tensor, keys_TK: Tensor, num_keys: int) -> SortedRows:
        """See `Ops.sort_rows`."""
        return routing.sort_rows(x_TH, keys_TK, num_keys)

    def combine_experts(self, y_MN: Tensor, rows: SortedRows, weights_TE: Tensor) -> Tensor:
        """See `Ops.combine_experts`."""
        return routing.combine_experts(y_MN, rows, weights_TE)

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return norms.rms_norm(x_TN, weight_N, eps)

    def add_rms_norm(
        self, x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`."""
        return norms.add_rms_norm(x_TN, residual_TN, weight_N, eps)

    def swiglu(self, x_T2N: Tensor) -> Tensor:
        """See `Ops.swiglu`."""
        return norms.swiglu(x_T2N)

    def swiglu_backward(self, x_T2N: Tensor, grad_TN: Tensor) -> Tensor:
        """See `Ops.swiglu_backward`."""
        return training.swiglu_backward(x_T2N, grad_TN)

    def attention(self, query_DHLX: Tensor, key_DHLX: Tensor, value_DHLV: Tensor, scale: float) -> Tensor:
        """See `Ops.attention`."""
        return training.attention(query_DHLX, key_DHLX, value_DHLV, scale)

    def rotate_interleaved(self, x: Tensor, rotation: Rotation) -> Tensor:
        """See `Ops.rotate_interleaved`."""
        return attention.rotate_interleaved(x, rotation)

    def make_cache(
        self, num_slots: int, block_tokens: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> LatentCache:
        """See `Ops.make_cache`: operators want both parts contiguous."""
        return LatentCache.apart(num_slots, block_tokens, widths, dtype, device)

    def write_latents(
        self,
        cache: LatentCache,
        kv_TX: Tensor,
        norm_weight_C: Tensor,
        eps: float,
        rotation: Rotation,
        slots_T: Tensor,
    ) -> None:
        """See `Ops.write_latents`."""
        attention.write_latents(cache, kv_TX, norm_weight_C, eps, rotation, slots_T)

    def pack_mla(self, weights: MlaWeights) -> MlaWeights:
        """See `Ops.pack_mla`."""
        return prolog.pack(weights, is_allowed=self._mla_prolog)

    def decode_queries(
        self, x_TK: Tensor, weights: MlaWeights, rotation: Rotation, cache: LatentCache, slots_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.decode_queries`."""
        if prolog.takes(x_TK, weights, cache):
            return prolog.decode_queries(x_TK, weights, rotation, cache, slots_T)
        return super().decode_queries(x_TK, weights, rotation, cache, slots_T)

    def mla_decode(
        self, query_BHC: Tensor, query_BHD: Tensor, cache: LatentCache, context: DecodeContext, scale: float
    ) -> Tensor:
        """See `Ops.mla_decode`."""
        return attention.mla_decode(query_BHC, query_BHD, cache, context, scale)

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
        """See `Ops.attend_block`."""
        return attention.attend_block(query_THN, query_THD, key_LHN, key_LD, value_LHV, scale, causal=causal)
