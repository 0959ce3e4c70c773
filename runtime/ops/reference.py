"""Plain PyTorch references of the device operations; shape suffixes as in `base.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.lora_rows import LoraRows
from runtime.ops.rotation import Rotation
from runtime.ops.routing import SortedRows


def grouped_matmul(x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> Tensor:
    """Reference of `Ops.grouped_matmul`."""
    weight_GKN = weight_GJKW.transpose(1, 2).flatten(2)
    y_MN = x_MK.new_empty(x_MK.shape[0], weight_GKN.shape[2])
    start = 0
    for group, count in enumerate(counts_G.tolist()):
        y_MN[start : start + count] = x_MK[start : start + count] @ weight_GKN[group]
        start += count
    return y_MN


def grouped_outer(x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
    """Reference of `Ops.grouped_outer`."""
    outer_GKN = x_MK.new_zeros(len(counts_G), x_MK.shape[1], y_MN.shape[1], dtype=torch.float32)
    start = 0
    for group, count in enumerate(counts_G.tolist()):
        rows = slice(start, start + count)
        outer_GKN[group] = x_MK[rows].float().T @ y_MN[rows].float()
        start += count
    return outer_GKN


def lora_add_(y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], lora: LoraRows) -> None:
    """Reference of `Ops.lora_add_`."""
    width = y_MN.shape[1] // len(bs_PRN)
    rank = a_PKR.shape[2] // len(bs_PRN)
    for row, page in enumerate(lora.pages_M.tolist()):
        if page < 0:
            continue
        shrunk_R = x_MK[row] @ a_PKR[page]
        for part, b_PRN in enumerate(bs_PRN):
            delta_N = shrunk_R[part * rank : (part + 1) * rank] @ b_PRN[page]
            y_MN[row, part * width : (part + 1) * width] += delta_N


def combine_experts(y_MN: Tensor, rows: SortedRows, weights_TE: Tensor) -> Tensor:
    """Reference of `Ops.combine_experts`."""
    unsorted_MN = torch.empty_like(y_MN)
    unsorted_MN.index_copy_(0, rows.order_M, y_MN)
    return (unsorted_MN.view(*weights_TE.shape, -1).float() * weights_TE[..., None]).sum(1).to(y_MN.dtype)


def sum_rows(y_MN: Tensor, places_TE: Tensor) -> Tensor:
    """Reference of `Ops.sum_rows`, one row of each token after the other, so that not all are there in float32."""
    first_T, *rest = places_TE.unbind(1)
    sum_TN = y_MN.index_select(0, first_T).float()
    for places_T in rest:
        sum_TN += y_MN.index_select(0, places_T)
    return sum_TN.to(y_MN.dtype)


def rms_norm(x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """Reference of `Ops.rms_norm`, rounded to the input's dtype once, after the weight, as in DeepSeek's own code."""
    return torch.nn.functional.rms_norm(x_TN, weight_N.shape, weight_N, eps)


def add_rms_norm(x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Reference of `Ops.add_rms_norm`."""
    sum_TN = residual_TN + x_TN
    return rms_norm(sum_TN, weight_N, eps), sum_TN


def swiglu(x_T2N: Tensor) -> Tensor:
    """Reference of `Ops.swiglu`."""
    gate, up = x_T2N.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(x_T2N: Tensor, grad_TN: Tensor) -> Tensor:
    """Reference of `Ops.swiglu_backward`."""
    gate, up = x_T2N.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat((grad_TN * up * (sigmoid + silu * (1 - sigmoid)), grad_TN * silu), dim=-1)


def attention(query_DHLX: Tensor, key_DHLX: Tensor, value_DHLV: Tensor, scale: float) -> Tensor:
    """Reference of `Ops.attention`."""
    scores_DHLL = (query_DHLX @ key_DHLX.transpose(2, 3)).float() * scale
    later = torch.ones_like(scores_DHLL[0, 0], dtype=torch.bool).triu(1)
    return scores_DHLL.masked_fill(later, float("-inf")).softmax(-1).to(value_DHLV.dtype) @ value_DHLV


def rotate_interleaved(x: Tensor, rotation: Rotation) -> Tensor:
    """Reference of `Ops.rotate_interleaved`, computed in float32."""
    between = (1,) * (x.dim() - 2)
    cos, sin = (angle.view(angle.shape[0], *between, -1) for angle in (rotation.cos_TF, rotation.sin_TF))
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)


def write_latents(
    cache: LatentCache, kv_TX: Tensor, norm_weight_C: Tensor, eps: float, rotation: Rotation, slots_T: Tensor
) -> None:
    """Reference of `Ops.write_latents`."""
    latent_TC, rope_TD = kv_TX.split((cache.latent_SC.shape[1], cache.rope_SD.shape[1]), dim=-1)
    cache.write_(slots_T, rms_norm(latent_TC, norm_weight_C, eps), rotate_interleaved(rope_TD, rotation))


def mla_decode(
    query_BHC: Tensor, query_BHD: Tensor, cache: LatentCache, context: DecodeContext, scale: float
) -> Tensor:
    """Reference of `Ops.mla_decode`: every head attends over the same latents (multi-query attention)."""
    query_BHX = torch.cat((query_BHC, query_BHD), dim=-1)
    latents_BLX = cache.read_joint(context.slots_BL.flatten()).unflatten(0, context.slots_BL.shape)
    lens_B = context.lens_B if context.is_padded else None
    return attend_latents(query_BHX, latents_BLX, lens_B, scale, query_BHC.shape[2])


def attend_latents(
    query_BHX: Tensor, latents_BLX: Tensor, lens_B: Tensor | None, scale: float, num_latent: int
) -> Tensor:
    """Attention of one query a sequence over its gathered latents, which are masked in place.

    Padded slots are zeroed as well as masked: they belong to others, and 0 x NaN would let a broken neighbour in.
    """
    past_end_BL = None
    if lens_B is not None:
        past_end_BL = torch.arange(latents_BLX.shape[1], device=lens_B.device)[None] >= lens_B[:, None]
        latents_BLX.masked_fill_(past_end_BL[..., None], 0)
    scores_BHL = torch.bmm(query_BHX, latents_BLX.transpose(1, 2)).float().mul_(scale)
    if past_end_BL is not None:
        scores_BHL.masked_fill_(past_end_BL[:, None], float("-inf"))
    probs_BHL = scores_BHL.softmax(-1).to(query_BHX.dtype)
    return torch.bmm(probs_BHL, latents_BLX[..., :num_latent])


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
    """Reference of `Ops.attend_block`."""
    query_HTX, key_HLX = joined_heads(query_THN, query_THD, key_LHN, key_LD)
    value_HLV = value_LHV.transpose(0, 1)
    scores_HTL = torch.bmm(query_HTX, key_HLX.transpose(1, 2)).float() * scale
    if causal:
        later = torch.ones_like(scores_HTL[0], dtype=torch.bool).triu(1)
        scores_HTL.masked_fill_(later, float("-inf"))
    lse_HT = scores_HTL.logsumexp(-1)
    probs_HTL = (scores_HTL - lse_HT[..., None]).exp_()
    out_HTV = torch.bmm(probs_HTL.to(value_HLV.dtype), value_HLV).float()
    return out_HTV.transpose(0, 1), lse_HT.T


def joined_heads(
    query_THN: Tensor, query_THD: Tensor, key_LHN: Tensor, key_LD: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries [H, T, X] and keys [H, L, X] of both parts, X = N + D; the heads share the key's rope part."""
    query_THX = torch.cat((query_THN, query_THD), dim=-1)
    key_LHX = torch.cat((key_LHN, key_LD[:, None].expand(-1, key_LHN.shape[1], -1)), dim=-1)
    return query_THX.transpose(0, 1), key_LHX.transpose(0, 1)


def merge_blocks(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two partial attentions over disjoint keys by their log-sum-exp; [T, H, V] and [T, H], float32."""
    merged = torch.logaddexp(lse, block_lse)
    weight = (lse - merged).exp_()[..., None]
    block_weight = (block_lse - merged).exp_()[..., None]
    return out * weight + block_out * block_weight, merged
