"""Latent attention in the server: rotation, the paged cache, decoding on it and blocks of a prefill.

Shape suffixes as in `base.py`. Operators are made for DeepSeek's sizes: C = 512, D = 64, N = V = 128.
"""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from runtime.ops import reference
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.npu.masks import compressed_causal_mask
from runtime.ops.npu.norms import rms_norm
from runtime.ops.rotation import Rotation
from runtime.ops.told import tell_once

NUM_LATENT, NUM_ROPE, HEAD_WIDTH = 512, 64, 128
DECODE_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_PREFILL_HEADS = 256
BLOCK_MULTIPLE, MAX_BLOCK_TOKENS = 16, 1024
_HALVES = (torch.float16, torch.bfloat16)
_CAUSAL, _WITHOUT_MASK = 3, 0  # of `sparse_mode`


def rotate_interleaved(x: Tensor, rotation: Rotation) -> Tensor:
    """`Ops.rotate_interleaved`; with a gradient, or in float32, by the operator that keeps the layout."""
    if x.shape[-1] != NUM_ROPE:
        tell_once("npu_interleave_rope", f"a rotated part of {x.shape[-1]}, where it takes {NUM_ROPE}")
        return reference.rotate_interleaved(x, rotation)
    cos, sin = (angle[:, None, None] for angle in rotation.wide(x.dtype))
    x_TA1D = x.reshape(x.shape[0], -1, 1, NUM_ROPE)
    if x.dtype in _HALVES and not (x.requires_grad and torch.is_grad_enabled()):
        turned: Tensor = torch_npu.npu_interleave_rope(x_TA1D.contiguous(), cos, sin)
    else:
        halves = x_TA1D.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = torch_npu.npu_rotary_mul(halves, cos, sin)
    return turned.view(x.shape)


def write_latents(
    cache: LatentCache, kv_TX: Tensor, norm_weight_C: Tensor, eps: float, rotation: Rotation, slots_T: Tensor
) -> None:
    """`Ops.write_latents`, into a cache whose parts lie apart."""
    num_tokens, widths = kv_TX.shape[0], (cache.latent_SC.shape[1], cache.rope_SD.shape[1])
    if widths == (NUM_LATENT, NUM_ROPE) and kv_TX.dtype in _HALVES:
        cos, sin = (angle.view(1, 1, num_tokens, NUM_ROPE) for angle in rotation.wide(kv_TX.dtype))
        torch_npu.npu_kv_rmsnorm_rope_cache(
            kv_TX.contiguous().view(1, 1, num_tokens, NUM_LATENT + NUM_ROPE),
            norm_weight_C,
            cos,
            sin,
            slots_T,
            cache.rope_SD.view(-1, cache.block_tokens, 1, NUM_ROPE),
            cache.latent_SC.view(-1, cache.block_tokens, 1, NUM_LATENT),
            epsilon=eps,
            cache_mode="PA",
        )
        return
    tell_once("npu_kv_rmsnorm_rope_cache", f"widths {widths} in {kv_TX.dtype}: it takes 512 and 64 in 16 bits")
    latent_TC, rope_TD = kv_TX.split(widths, dim=-1)
    indices_T1 = slots_T[:, None]
    normed_TC = rms_norm(latent_TC.contiguous(), norm_weight_C, eps)
    torch_npu.npu_scatter_nd_update_(cache.latent_SC, indices_T1, normed_TC)
    torch_npu.npu_scatter_nd_update_(cache.rope_SD, indices_T1, rotate_interleaved(rope_TD, rotation))


def mla_decode(
    query_BHC: Tensor, query_BHD: Tensor, cache: LatentCache, context: DecodeContext, scale: float
) -> Tensor:
    """`Ops.mla_decode`, on the paged cache itself."""
    problem = decode_problem(query_BHC, query_BHD, cache)
    if problem is not None:
        tell_once("npu_fused_infer_attention_score", f"decoding with {problem}")
        return reference.mla_decode(query_BHC, query_BHD, cache, context, scale)
    num_heads, block_tokens = query_BHC.shape[1], cache.block_tokens
    latents = cache.latent_SC.view(-1, 1, block_tokens, NUM_LATENT)
    ropes = cache.rope_SD.view(-1, 1, block_tokens, NUM_ROPE)
    query, query_rope = query_BHC.contiguous()[:, :, None], query_BHD.contiguous()[:, :, None]
    out: Tensor
    if hasattr(torch_npu, "npu_fused_infer_attention_score_v2"):
        out, _ = torch_npu.npu_fused_infer_attention_score_v2(
            query,
            latents,
            latents,
            query_rope=query_rope,
            key_rope=ropes,
            actual_seq_kvlen=context.lens,
            block_table=context.block_table_BN,
            num_query_heads=num_heads,
            num_key_value_heads=1,
            softmax_scale=scale,
            input_layout="BNSD",
            sparse_mode=_WITHOUT_MASK,
            block_size=block_tokens,
        )
    else:
        out, _ = torch_npu.npu_fused_infer_attention_score(
            query,
            latents,
            latents,
            query_rope=query_rope,
            key_rope=ropes,
            actual_seq_lengths_kv=context.lens,
            block_table=context.block_table_BN,
            num_heads=num_heads,
            num_key_value_heads=1,
            scale=scale,
            input_layout="BNSD",
            sparse_mode=_WITHOUT_MASK,
            block_size=block_tokens,
        )
    return out[:, :, 0]


def decode_problem(query_BHC: Tensor, query_BHD: Tensor, cache: LatentCache) -> str | None:
    """What the operator does not take of these shapes, None if it takes them."""
    widths = (query_BHC.shape[2], query_BHD.shape[2])
    if widths != (NUM_LATENT, NUM_ROPE):
        return f"widths {widths}, where it takes ({NUM_LATENT}, {NUM_ROPE})"
    if query_BHC.dtype not in _HALVES:
        return f"{query_BHC.dtype}, where it takes 16 bits"
    if query_BHC.shape[1] not in DECODE_HEADS:
        return f"{query_BHC.shape[1]} heads, where it takes powers of two up to 128"
    if cache.block_tokens % BLOCK_MULTIPLE or cache.block_tokens > MAX_BLOCK_TOKENS:
        return f"--kv-block-tokens {cache.block_tokens}, where it takes multiples of 16 up to 1024"
    return None


def attend_block(
    query_THN: Tensor,
    query_THD: Tensor,
    key_LHN: Tensor,
    key_LD: Tensor,
    value_LHV: Tensor,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """`Ops.attend_block`; the operator's output is rounded to 16 bits before blocks are merged."""
    problem = prefill_problem(query_THN, query_THD, value_LHV)
    if problem is not None:
        tell_once("npu_fused_infer_attention_score", f"prefill with {problem}")
        return reference.attend_block(query_THN, query_THD, key_LHN, key_LD, value_LHV, scale, causal=causal)
    num_heads = query_THN.shape[1]
    out_THV, lse_TH1 = torch_npu.npu_fused_infer_attention_score(
        query_THN.contiguous(),
        key_LHN.contiguous(),
        value_LHV.contiguous(),
        query_rope=query_THD.contiguous(),
        key_rope=key_LD[:, None].expand(-1, num_heads, -1).contiguous(),
        atten_mask=compressed_causal_mask(query_THN.device) if causal else None,
        actual_seq_lengths=[query_THN.shape[0]],
        actual_seq_lengths_kv=[key_LHN.shape[0]],
        num_heads=num_heads,
        num_key_value_heads=num_heads,
        scale=scale,
        input_layout="TND",
        sparse_mode=_CAUSAL if causal else _WITHOUT_MASK,
        softmax_lse_flag=True,
    )
    return out_THV.float(), lse_TH1[..., 0]


def prefill_problem(query_THN: Tensor, query_THD: Tensor, value_LHV: Tensor) -> str | None:
    """What the operator does not take of these shapes, None if it takes them."""
    widths = (query_THN.shape[2], query_THD.shape[2], value_LHV.shape[2])
    if widths != (HEAD_WIDTH, NUM_ROPE, HEAD_WIDTH):
        return f"widths {widths}, where it takes ({HEAD_WIDTH}, {NUM_ROPE}, {HEAD_WIDTH})"
    if query_THN.dtype is not torch.bfloat16:
        return f"{query_THN.dtype}, where it takes torch.bfloat16"
    if query_THN.shape[1] > MAX_PREFILL_HEADS:
        return f"{query_THN.shape[1]} heads, where it takes {MAX_PREFILL_HEADS}"
    return None
