"""Rotary position embedding and the writing and reading of the paged latent cache.

Shape suffixes: B sequences (or tokens), N heads, S positions, D rope width, C latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.npu.bench.limits import (
    FLOATS,
    HALVES,
    poison,
    refuse_unmodelled,
    require,
    require_contiguous,
    require_dtype,
    require_one_of,
    require_rank,
    require_same_dtype,
    require_shape,
)
from tests.npu.bench.registry import kernel

INTERLEAVE = "npu_interleave_rope"
ROTARY = "npu_rotary_mul"
CACHE = "npu_kv_rmsnorm_rope_cache"
SCATTER = "npu_scatter_nd_update_"
GATHER = "npu_gather_pa_kv_cache"
NUM_ROPE = 64
NUM_LATENT = 512
MAX_ROTARY_WIDTH = 896
MAX_ROTARY_ROWS = 1000


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = x.float().unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return (halves * cos.float() + _rotate_half(halves) * sin.float()).to(x.dtype)


def _require_angles(operator: str, x: Tensor, angles: tuple[tuple[str, Tensor], ...]) -> None:
    for name, tensor in angles:
        require_same_dtype(operator, name, tensor, "x", x)
        require_rank(operator, name, tensor, 4)
        require_contiguous(operator, name, tensor)
        require(tensor.shape[2] in (1, x.shape[2]), operator, f"{name}.shape", list(tensor.shape),
                f"x is {list(x.shape)}")
        require_shape(operator, name, tensor, [x.shape[0], 1, tensor.shape[2], NUM_ROPE])


@kernel(INTERLEAVE)
def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (even, odd) rotated, written as two halves; x [B, N, S, 64], cos and sin [B, 1, S or 1, 64]."""
    require_dtype(INTERLEAVE, "x", x, HALVES)
    require_rank(INTERLEAVE, "x", x, 4)
    require(x.shape[3] == NUM_ROPE, INTERLEAVE, "D", x.shape[3], f"it must be {NUM_ROPE}")
    require_contiguous(INTERLEAVE, "x", x)
    _require_angles(INTERLEAVE, x, (("cos", cos), ("sin", sin)))
    require_shape(INTERLEAVE, "sin", sin, cos.shape)
    return interleaved(x, cos, sin)


def _rotary_formula(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    x = input.float()
    if rotary_mode == "half":
        turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)


@kernel(ROTARY, formula=_rotary_formula)
def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """input r1 + rotated(input) r2, the layout kept: halves or pairs are turned; all 4-D, r1 and r2 broadcast.

    The layout follows from the axes that r1 has. Fewer than 1,000 B and N are possible; in pairs mode fewer than
    1,000 B N, and the same r1 for all B.
    """
    refuse_unmodelled(ROTARY, rotate=rotate)
    require_one_of(ROTARY, "rotary_mode", rotary_mode, ("half", "interleave"))
    require_dtype(ROTARY, "input", input, FLOATS)
    require_rank(ROTARY, "input", input, 4)
    width = input.shape[3]
    require(width % 2 == 0 and width < MAX_ROTARY_WIDTH, ROTARY, "D", width,
            f"it must be even and < {MAX_ROTARY_WIDTH}")
    for name, tensor in (("r1", r1), ("r2", r2)):
        require_same_dtype(ROTARY, name, tensor, "input", input)
        require_rank(ROTARY, name, tensor, 4)
        fits = all(size in (1, whole) for size, whole in zip(tensor.shape, input.shape, strict=True))
        require(fits and tensor.shape[3] == width, ROTARY, f"{name}.shape", list(tensor.shape),
                f"it must broadcast over input {list(input.shape)}")
    require_shape(ROTARY, "r2", r2, r1.shape)
    _require_rotary_layout(input, r1, rotary_mode)
    return _rotary_formula(input, r1, r2, rotary_mode)


def _require_rotary_layout(input: Tensor, r1: Tensor, rotary_mode: str) -> None:
    """Read as BNSD, BSND or SBND with the positions on S and one r1 for all N, the other two axes must be short."""
    is_half = rotary_mode == "half"
    if r1.shape == input.shape and is_half:
        return
    sizes = [
        (input.shape[b], input.shape[n])
        for b, n, s in ((0, 1, 2), (0, 2, 1), (1, 2, 0))
        if r1.shape[n] == 1 and r1.shape[s] == input.shape[s] and (is_half or r1.shape[b] == 1)
    ]
    limited = [max(b, n) if is_half else b * n for b, n in sizes]
    require(min(limited, default=MAX_ROTARY_ROWS) < MAX_ROTARY_ROWS, ROTARY, "B, N" if is_half else "B N", sizes,
            f"it must be < {MAX_ROTARY_ROWS}; r1 has the shape {list(r1.shape)}")


@kernel(CACHE)
def kv_rmsnorm_rope_cache(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, *,
    k_rope_scale: Tensor | None = None, c_kv_scale: Tensor | None = None, k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None, v: Tensor | None = None, epsilon: float = 1e-5, cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm and rotate kv [B, 1, S, 576], write both parts at their slots; the caches are changed in place.

    Returns both caches, and the rotated and normed parts: not written unless `is_output_kv`.
    """
    refuse_unmodelled(CACHE, k_rope_scale=k_rope_scale, c_kv_scale=c_kv_scale, k_rope_offset=k_rope_offset,
                      c_kv_offset=c_kv_offset, v=v)
    k_embed, y = _write_latents(kv, gamma, cos, sin, index, k_cache, ckv_cache, epsilon, cache_mode)
    if not is_output_kv:
        k_embed, y = poison(k_embed.shape, kv.dtype), poison(y.shape, kv.dtype)
    # The dispatcher wants results that share no memory with inputs; the device's are its input caches themselves.
    return k_cache, ckv_cache, k_embed, y


@kernel(f"{CACHE}_v2")
def kv_rmsnorm_rope_cache_v2(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, *,
    k_rope_scale: Tensor | None = None, c_kv_scale: Tensor | None = None, k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None, v: Tensor | None = None, epsilon: float = 1e-5, cache_mode: str = "Norm",
    is_output_kv: bool = False, k_cache_dtype: int | None = None, ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As the first version; returns the rotated and normed parts only."""
    refuse_unmodelled(CACHE, k_rope_scale=k_rope_scale, c_kv_scale=c_kv_scale, k_rope_offset=k_rope_offset,
                      c_kv_offset=c_kv_offset, v=v, k_cache_dtype=k_cache_dtype, ckv_cache_dtype=ckv_cache_dtype)
    k_embed, y = _write_latents(kv, gamma, cos, sin, index, k_cache, ckv_cache, epsilon, cache_mode)
    return (k_embed, y) if is_output_kv else (poison(k_embed.shape, kv.dtype), poison(y.shape, kv.dtype))


def _write_latents(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor,
    epsilon: float, cache_mode: str,
) -> tuple[Tensor, Tensor]:
    require_one_of(CACHE, "cache_mode", cache_mode, ("PA", "PA_BNSD"))
    require_dtype(CACHE, "kv", kv, HALVES)
    require_rank(CACHE, "kv", kv, 4)
    require_contiguous(CACHE, "kv", kv)
    num_tokens = kv.shape[0] * kv.shape[2]
    require_shape(CACHE, "kv", kv, [kv.shape[0], 1, kv.shape[2], NUM_LATENT + NUM_ROPE])
    require_shape(CACHE, "gamma", gamma, [NUM_LATENT])
    require_same_dtype(CACHE, "gamma", gamma, "kv", kv)
    _require_angles(CACHE, kv, (("cos", cos), ("sin", sin)))
    for name, tensor in (("cos", cos), ("sin", sin)):
        require_shape(CACHE, name, tensor, [kv.shape[0], 1, kv.shape[2], NUM_ROPE])
    _require_caches(kv, index, k_cache, ckv_cache, num_tokens)
    latent, rope = kv.split((NUM_LATENT, NUM_ROPE), dim=-1)
    inverse = (latent.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    y = (latent.float() * inverse * gamma.float()).to(kv.dtype)
    k_embed = interleaved(rope, cos, sin)
    k_cache.view(-1, NUM_ROPE)[index] = k_embed.reshape(-1, NUM_ROPE)
    ckv_cache.view(-1, NUM_LATENT)[index] = y.reshape(-1, NUM_LATENT)
    return k_embed, y


def _require_caches(kv: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, num_tokens: int) -> None:
    for name, cache, width in (("k_cache", k_cache, NUM_ROPE), ("ckv_cache", ckv_cache, NUM_LATENT)):
        require_same_dtype(CACHE, name, cache, "kv", kv)
        require_rank(CACHE, name, cache, 4)
        # A copy made for contiguity would take the writes in the cache's place.
        require_contiguous(CACHE, name, cache)
        require_shape(CACHE, name, cache, [*ckv_cache.shape[:2], 1, width])
    num_blocks, block_size = k_cache.shape[:2]
    needed = -(-kv.shape[2] // block_size) * kv.shape[0]
    require(num_blocks >= needed, CACHE, "blocks of the cache", num_blocks,
            f"it must be >= ceil(S / block_size) B = {needed}")
    require_dtype(CACHE, "index", index, (torch.int64,))
    require_shape(CACHE, "index", index, [num_tokens])
    slots = index.tolist()
    inside = all(0 <= slot < num_blocks * block_size for slot in slots)
    require(inside, CACHE, "index", slots, f"slots lie in 0..{num_blocks * block_size - 1}")
    require(len(set(slots)) == len(slots), CACHE, "index", slots, "a slot must not be repeated")


@kernel(SCATTER)
def scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices[t]] = updates[t] for indices [T, 1], in place."""
    require_contiguous(SCATTER, "input", input)
    require_dtype(SCATTER, "indices", indices, (torch.int32, torch.int64))
    require_rank(SCATTER, "indices", indices, 2)
    require_shape(SCATTER, "indices", indices, [len(updates), 1])
    require_same_dtype(SCATTER, "updates", updates, "input", input)
    require_shape(SCATTER, "updates", updates, [len(indices), *input.shape[1:]])
    rows = indices[:, 0].tolist()
    require(all(0 <= row < len(input) for row in rows), SCATTER, "indices", rows, f"they lie in 0..{len(input) - 1}")
    # Which of two updates of one row stays is not defined.
    require(len(set(rows)) == len(rows), SCATTER, "indices", rows, "a row must not be repeated")
    input[indices[:, 0].long()] = updates
    return input


@kernel(GATHER)
def gather_pa_kv_cache(
    key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, key: Tensor, value: Tensor, *,
    seq_offset: Tensor | None = None, is_seq_lens_cumsum: bool = False,
) -> None:
    """Copy each sequence's cached rows, one after the other, into key and value, in place; rows beyond stay."""
    refuse_unmodelled(GATHER, seq_offset=seq_offset)
    require(not is_seq_lens_cumsum, GATHER, "is_seq_lens_cumsum", is_seq_lens_cumsum, "the bench models lengths only")
    for name, tensor in (("block_tables", block_tables), ("seq_lens", seq_lens)):
        require_dtype(GATHER, name, tensor, (torch.int32,))
        require_contiguous(GATHER, name, tensor)
    require_rank(GATHER, "block_tables", block_tables, 2)
    require_shape(GATHER, "seq_lens", seq_lens, [len(block_tables)])
    lens = seq_lens.tolist()
    for name, cache, out in (("key", key_cache, key), ("value", value_cache, value)):
        require_rank(GATHER, f"{name}_cache", cache, 4)
        require_contiguous(GATHER, f"{name}_cache", cache)
        require_contiguous(GATHER, name, out)
        require_same_dtype(GATHER, name, out, f"{name}_cache", cache)
        require(out.shape[0] >= sum(lens) and out.shape[1:] == cache.shape[2:], GATHER,
                f"{name}.shape", list(out.shape),
                f"it must be [>= {sum(lens)}, {list(cache.shape[2:])}]")
        block_size, start = cache.shape[1], 0
        for table, length in zip(block_tables.tolist(), lens, strict=True):
            blocks = table[: -(-length // block_size)]
            inside = len(blocks) * block_size >= length and all(0 <= block < len(cache) for block in blocks)
            require(inside, GATHER, "block_tables", blocks, f"{length} tokens need blocks in 0..{len(cache) - 1}")
            out[start : start + length] = cache[blocks].flatten(0, 1)[:length]
            start += length
