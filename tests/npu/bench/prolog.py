"""npu_mla_prolog_v3, unquantised, on a paged cache.

Limits are those of the documentation in torch_npu 2.13 and of CANN's aclnnMlaPrologV3WeightNz, the stricter of both.
Shape suffixes: T tokens, He hidden, Hcq query latent, N heads, D and Dr a head without and with rotation, Hckv latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.npu.bench.formats import is_in_fractals
from tests.npu.bench.limits import (
    poison,
    refuse_unmodelled,
    require,
    require_contiguous,
    require_dtype,
    require_one_of,
    require_rank,
    require_shape,
)
from tests.npu.bench.registry import kernel
from tests.npu.bench.rope_cache import interleaved

PROLOG = "npu_mla_prolog_v3"
NUM_HIDDEN, NUM_QUERY_LATENT, NUM_LATENT, NUM_NOPE, NUM_ROPE = 7168, 1536, 512, 128, 64
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
BLOCK_SIZES = (16, 128)
MAX_TOKENS = 1_048_576
_UNMODELLED = ("_dtype", "_alpha", "_scale_x", "_scale_w_dq", "_scale_w_uq_qr", "_scale_w_dkv_kr", "_scale_ckv",
               "_scale_ckr", "_scales_cq", "_seq_len")  # fmt: skip
_UNQUANTISED = {"weight_quant_mode": 0, "kv_cache_quant_mode": 0, "query_quant_mode": 0, "ckvkr_repo_mode": 0,
                "quant_scale_repo_mode": 0, "tile_size": 128, "qc_qr_scale": 1.0, "kc_scale": 1.0}


@kernel(PROLOG)
def mla_prolog(
    token_x: Tensor, weight_dq: Tensor, weight_uq_qr: Tensor, weight_uk: Tensor, weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor, rmsnorm_gamma_ckv: Tensor, rope_sin: Tensor, rope_cos: Tensor, kv_cache: Tensor,
    kr_cache: Tensor, *, cache_index: Tensor | None = None, dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None, dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None, quant_scale_ckv: Tensor | None = None,
    quant_scale_ckr: Tensor | None = None, smooth_scales_cq: Tensor | None = None,
    actual_seq_len: Tensor | None = None, k_nope_clip_alpha: Tensor | None = None, rmsnorm_epsilon_cq: float = 1e-5,
    rmsnorm_epsilon_ckv: float = 1e-5, cache_mode: str = "PA_BSND", query_norm_flag: bool = False,
    weight_quant_mode: int = 0, kv_cache_quant_mode: int = 0, query_quant_mode: int = 0, ckvkr_repo_mode: int = 0,
    quant_scale_repo_mode: int = 0, tile_size: int = 128, qc_qr_scale: float = 1.0, kc_scale: float = 1.0,
    token_x_dtype: int | None = None, weight_dq_dtype: int | None = None, weight_uq_qr_dtype: int | None = None,
    weight_dkv_kr_dtype: int | None = None, kv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries absorbed [T, N, 512] and rotated [T, N, 64]; both caches are changed in place.

    The other results are not written, unless `query_norm_flag` asks for the query's latent.
    """
    given = dict(locals())
    refuse_unmodelled(PROLOG, **{name: value for name, value in given.items() if name.endswith(_UNMODELLED)})
    for name, value in _UNQUANTISED.items():
        require_one_of(PROLOG, name, given[name], (value,))
    require_one_of(PROLOG, "cache_mode", cache_mode, ("PA_BSND",))
    num_heads = weight_uk.shape[0]
    _require_operands(given, num_heads)
    slots = _require_caches(cache_index, kv_cache, kr_cache, token_x.shape[0])
    norm_cq = _normed(_product(token_x, weight_dq), rmsnorm_gamma_cq, rmsnorm_epsilon_cq)
    query = _product(norm_cq, weight_uq_qr).view(-1, num_heads, NUM_NOPE + NUM_ROPE)
    nope, rope = query.split((NUM_NOPE, NUM_ROPE), dim=-1)
    absorbed = torch.einsum("tnd,ndc->tnc", nope.float(), weight_uk.float()).to(token_x.dtype)
    latent, key = _product(token_x, weight_dkv_kr).split((NUM_LATENT, NUM_ROPE), dim=-1)
    kv_cache.view(-1, NUM_LATENT)[slots] = _normed(latent, rmsnorm_gamma_ckv, rmsnorm_epsilon_ckv)
    kr_cache.view(-1, NUM_ROPE)[slots] = interleaved(key, rope_cos, rope_sin)
    turned = interleaved(rope, rope_cos[:, None], rope_sin[:, None])
    unused = poison((1,), torch.float32)
    return absorbed, turned, unused, norm_cq if query_norm_flag else poison((1,), token_x.dtype), unused.clone()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Summed in float32 and rounded once."""
    return (x.float() @ weight.float()).to(x.dtype)


def _normed(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    inverse = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * inverse * gamma.float()).to(x.dtype)


def _require_operands(given: dict[str, Tensor], num_heads: int) -> None:
    require_rank(PROLOG, "token_x", given["token_x"], 2)
    require_one_of(PROLOG, "heads", num_heads, HEADS)
    num_tokens = given["token_x"].shape[0]
    # An empty one is documented to update nothing; what the rest then holds is not.
    require(0 < num_tokens <= MAX_TOKENS, PROLOG, "tokens", num_tokens, f"they must lie in 1..{MAX_TOKENS}")
    shapes = {
        "token_x": (num_tokens, NUM_HIDDEN),
        "weight_dq": (NUM_HIDDEN, NUM_QUERY_LATENT),
        "weight_uq_qr": (NUM_QUERY_LATENT, num_heads * (NUM_NOPE + NUM_ROPE)),
        "weight_uk": (num_heads, NUM_NOPE, NUM_LATENT),
        "weight_dkv_kr": (NUM_HIDDEN, NUM_LATENT + NUM_ROPE),
        "rmsnorm_gamma_cq": (NUM_QUERY_LATENT,),
        "rmsnorm_gamma_ckv": (NUM_LATENT,),
        "rope_sin": (num_tokens, NUM_ROPE),
        "rope_cos": (num_tokens, NUM_ROPE),
    }
    for name, shape in shapes.items():
        require_shape(PROLOG, name, given[name], shape)
        require_dtype(PROLOG, name, given[name], (torch.bfloat16,))
        require_contiguous(PROLOG, name, given[name])
        in_fractals = name in ("weight_dq", "weight_uq_qr", "weight_dkv_kr")
        require(is_in_fractals(given[name]) == in_fractals, PROLOG, f"layout of {name}",
                "FRACTAL_NZ" if not in_fractals else "ND", f"it must be {'FRACTAL_NZ' if in_fractals else 'ND'}")


def _require_caches(cache_index: Tensor | None, kv_cache: Tensor, kr_cache: Tensor, num_tokens: int) -> Tensor:
    require(cache_index is not None, PROLOG, "cache_index", None, "a paged cache needs it")
    assert cache_index is not None
    for name, cache, width in (("kv_cache", kv_cache, NUM_LATENT), ("kr_cache", kr_cache, NUM_ROPE)):
        require_rank(PROLOG, name, cache, 4)
        require_dtype(PROLOG, name, cache, (torch.bfloat16,))
        # A copy made for contiguity would take the writes in the cache's place.
        require_contiguous(PROLOG, name, cache)
        require_shape(PROLOG, name, cache, [*kv_cache.shape[:2], 1, width])
    require_one_of(PROLOG, "block size", kv_cache.shape[1], BLOCK_SIZES)
    require_dtype(PROLOG, "cache_index", cache_index, (torch.int64,))
    require_contiguous(PROLOG, "cache_index", cache_index)
    require_shape(PROLOG, "cache_index", cache_index, [num_tokens])
    slots, num_slots = cache_index.tolist(), kv_cache.shape[0] * kv_cache.shape[1]
    # Neither is checked by the device.
    require(all(0 <= slot < num_slots for slot in slots), PROLOG, "cache_index", slots,
            f"slots lie in 0..{num_slots - 1}")
    require(len(set(slots)) == len(slots), PROLOG, "cache_index", slots, "a slot must not be repeated")
    return cache_index
