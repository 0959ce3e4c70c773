"""MLA's projections of a decoding step as one operator, for DeepSeek-V3's sizes: q_a, its norm, q_b, the absorbed kv_b,
kv_a, its norm, both rotations and the cache. Shape suffixes as in `runtime/ops/mla_weights.py`.

The operator wants three weights as [in, out] in the device's fractal layout. They are cast once, after loading, and
take the place of those that were loaded; `linear` multiplies by their transposed views, by which `takes` knows them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache as once

import torch
import torch_npu
from torch import Tensor

from runtime.ops.latent_cache import LatentCache
from runtime.ops.mla_weights import MlaWeights, QueryLatent
from runtime.ops.npu.attention import DECODE_HEADS, HEAD_WIDTH, NUM_LATENT, NUM_ROPE
from runtime.ops.rotation import Rotation
from runtime.ops.told import tell_once

logger = logging.getLogger(__name__)

NUM_HIDDEN, NUM_QUERY_LATENT = 7168, 1536  # documents differ on others than 7168
BLOCK_TOKENS = (16, 128)
_OPERATOR, _SEPARATE = "npu_mla_prolog_v3", "the separate operators of projections, norms, rotation and cache"
_FRACTAL_NZ = 29  # of `aclFormat`


def pack(weights: MlaWeights, *, is_allowed: bool) -> MlaWeights:
    """`Ops.pack_mla`: the same weights where the operator cannot take them, which is told once with the reason."""
    problem = weights_problem(weights) if is_allowed else "GRAFT_NPU_MLA_PROLOG is 0"
    latent = weights.query_latent
    if problem is not None or latent is None:
        tell_once(_OPERATOR, problem or "queries without a latent", _SEPARATE)
        return weights
    down_RK, up_OR, kv_XK = (_in_fractals(each) for each in (latent.down_RK, weights.query_up_OR, weights.kv_down_XK))
    if down_RK is None or up_OR is None or kv_XK is None:
        tell_once(_OPERATOR, f"npu_format_cast did not give the layout FRACTAL_NZ ({_FRACTAL_NZ})", _SEPARATE)
        return weights
    _tell_use()
    return replace(weights, query_latent=QueryLatent(down_RK, latent.norm_R), query_up_OR=up_OR, kv_down_XK=kv_XK)


def weights_problem(weights: MlaWeights) -> str | None:
    """What the operator does not take of a layer, None if it takes it."""
    if not hasattr(torch_npu, _OPERATOR):
        return "this torch_npu has no such operator"
    if weights.query_latent is None:
        return "queries without a latent"
    num_latent, num_hidden = weights.query_latent.down_RK.shape
    num_heads, num_nope, num_kv_latent = weights.key_up_HNC.shape
    sizes = (num_hidden, num_latent, num_kv_latent, num_nope, weights.kv_down_XK.shape[0] - num_kv_latent)
    taken = (NUM_HIDDEN, NUM_QUERY_LATENT, NUM_LATENT, HEAD_WIDTH, NUM_ROPE)
    if sizes != taken:
        return f"hidden, query latent, latent, head and rotated part of {sizes}, where it takes {taken}"
    if num_heads not in DECODE_HEADS:
        return f"{num_heads} heads, where it takes powers of two up to 128"
    if weights.kv_down_XK.dtype is not torch.bfloat16:
        return f"{weights.kv_down_XK.dtype}, where it takes torch.bfloat16"
    return None


def takes(x_TK: Tensor, weights: MlaWeights, cache: LatentCache) -> bool:
    """Whether the operator runs: packed weights, and a cache of blocks that it knows."""
    if weights.kv_down_XK.is_contiguous() or not x_TK.shape[0]:
        return False  # told when they were packed
    if cache.block_tokens not in BLOCK_TOKENS:
        tell_once(_OPERATOR, f"--kv-block-tokens {cache.block_tokens}, where it takes 16 or 128", _SEPARATE)
        return False
    return True


def decode_queries(
    x_TK: Tensor, weights: MlaWeights, rotation: Rotation, cache: LatentCache, slots_T: Tensor
) -> tuple[Tensor, Tensor]:
    """`Ops.decode_queries`, of weights that `takes` has accepted."""
    latent = weights.query_latent
    if latent is None:
        raise ValueError(f"{_OPERATOR}: queries without a latent")
    cos_TD, sin_TD = rotation.wide(x_TK.dtype)
    query_THC, query_THD, *_ = torch_npu.npu_mla_prolog_v3(
        x_TK.contiguous(),
        latent.down_RK.T,
        weights.query_up_OR.T,
        weights.key_up_HNC,
        weights.kv_down_XK.T,
        latent.norm_R,
        weights.kv_norm_C,
        sin_TD,
        cos_TD,
        cache.latent_SC.view(-1, cache.block_tokens, 1, NUM_LATENT),
        cache.rope_SD.view(-1, cache.block_tokens, 1, NUM_ROPE),
        cache_index=slots_T,
        rmsnorm_epsilon_cq=weights.eps,
        rmsnorm_epsilon_ckv=weights.eps,
        cache_mode="PA_BSND",
    )
    return query_THC, query_THD


def _in_fractals(weight_NK: Tensor) -> Tensor | None:
    """A view [N, K] of the weight as [K, N] in fractals; None if the device gave another layout."""
    # Without this torch_npu answers the cast with a plain copy.
    getattr(torch, "npu").config.allow_internal_format = True  # noqa: B009 - torch has it only now
    weight_KN: Tensor = torch_npu.npu_format_cast(weight_NK.T.contiguous(), _FRACTAL_NZ)
    return weight_KN.T if torch.ops.npu.get_npu_format(weight_KN) == _FRACTAL_NZ else None


@once
def _tell_use() -> None:
    logger.info(
        "%s computes MLA's projections in steps that only decode and have no adapter on q, kv_a or kv_b; q_a, q_b and "
        "kv_a lie in FRACTAL_NZ for it, without a second copy. GRAFT_NPU_MLA_PROLOG=0 turns it off",
        _OPERATOR,
    )
