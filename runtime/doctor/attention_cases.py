"""Rotation, the paged latent cache, decoding on it, blocks of a prefill, and attention with gradients.

Shape suffixes as in `runtime/ops/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from runtime.doctor.case import Case, Exact, Prepared, Results, Source, described, num_bytes
from runtime.doctor.shapes import Shapes
from runtime.ops import reference
from runtime.ops.base import Ops
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.rotation import Rotation

EPS = 1e-6


def attention_cases() -> list[Case]:
    """Of `rotate_interleaved`, `write_latents` with `make_cache`, `mla_decode`, `attend_block` and `attention`."""
    found = []
    for phase in ("decode", "prefill"):
        found += [
            Case("rotate_interleaved", phase, partial(_rotate, phase=phase)),
            Case("write_latents", phase, partial(_write_latents, phase=phase), also=("make_cache",)),
        ]
    return [
        *found,
        Case("rotate_interleaved", "training, with gradient", _rotate_with_gradient),
        Case("mla_decode", "decode, equal lengths", partial(_mla_decode, is_ragged=False)),
        Case("mla_decode", "decode, unequal lengths", partial(_mla_decode, is_ragged=True)),
        Case("attend_block", "prefill, own keys", partial(_attend_block, causal=True)),
        Case("attend_block", "prefill, context", partial(_attend_block, causal=False)),
        Case("attention", "training, with gradients", _attention),
    ]


def random_rotation(shapes: Shapes, source: Source, num_tokens: int) -> Rotation:
    """Angles of so many tokens, the same on every device."""
    angles_TF = torch.rand(num_tokens, shapes.rope // 2, generator=source.host) * 6.3
    return Rotation(source.place(angles_TF.cos()), source.place(angles_TF.sin()))


def exact_rotation(exact: Exact, rotation: Rotation) -> Rotation:
    """The angles as the reference takes them."""
    return Rotation(exact(rotation.cos_TF), exact(rotation.sin_TF))


def _rotate(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    x = source.normal(shapes.tokens(phase), shapes.num_heads, shapes.rope)
    rotation = random_rotation(shapes, source, len(x))
    return Prepared(
        described(("x", x.shape)),
        run=lambda: (ops.rotate_interleaved(x, rotation),),
        reference=lambda exact: (reference.rotate_interleaved(exact(x), exact_rotation(exact, rotation)),),
        moved_bytes=2 * num_bytes(x),
        workspace_bytes=16 * x.numel(),
    )


def _rotate_with_gradient(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    x, grad = (source.normal(shapes.training_tokens, shapes.num_heads, shapes.rope) for _ in range(2))
    rotation = random_rotation(shapes, source, len(x))

    def expected(exact: Exact) -> Results:
        turn = partial(reference.rotate_interleaved, rotation=exact_rotation(exact, rotation))
        return _with_gradients(turn, exact(grad), exact(x))

    return Prepared(
        described(("x", x.shape)),
        run=lambda: _with_gradients(partial(ops.rotate_interleaved, rotation=rotation), grad, x),
        reference=expected,
        moved_bytes=4 * num_bytes(x),
        workspace_bytes=32 * x.numel(),
    )


def _with_gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> Results:
    """A function's value and the gradients of its inputs for that of its value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, grad)


def _write_latents(shapes: Shapes, ops: Ops, source: Source, *, phase: str) -> Prepared:
    num_tokens, widths = shapes.tokens(phase), (shapes.latent, shapes.rope)
    num_slots = (-(-num_tokens // shapes.block_tokens) + 2) * shapes.block_tokens
    kv_TX, weight_C = source.normal(num_tokens, sum(widths)), source.normal(shapes.latent)
    slots_T = source.place(torch.randperm(num_slots, generator=source.host)[:num_tokens])
    rotation = random_rotation(shapes, source, num_tokens)
    cache = ops.make_cache(num_slots, shapes.block_tokens, widths, source.dtype, source.device)
    for tensor in cache.tensors:
        source.count(tensor)

    def run() -> Results:
        ops.write_latents(cache, kv_TX, weight_C, EPS, rotation, slots_T)
        return cache.latent_SC, cache.rope_SD

    def expected(exact: Exact) -> Results:
        kv, weight, slots = exact(kv_TX), exact(weight_C), exact(slots_T)
        filled = LatentCache.joint(num_slots, shapes.block_tokens, widths, kv.dtype, kv.device)
        reference.write_latents(filled, kv, weight, EPS, exact_rotation(exact, rotation), slots)
        return filled.latent_SC, filled.rope_SD

    return Prepared(
        described(("kv", kv_TX.shape)) + f", {num_slots} slots",
        run=run,
        reference=expected,
        moved_bytes=2 * num_bytes(kv_TX),
        workspace_bytes=16 * kv_TX.numel(),
    )


def _mla_decode(shapes: Shapes, ops: Ops, source: Source, *, is_ragged: bool) -> Prepared:
    num_sequences, longest, block = shapes.decode_tokens, shapes.context_tokens, shapes.block_tokens
    lens = [longest * (n + 1) // num_sequences if is_ragged else longest for n in range(num_sequences)]
    num_blocks_each = [-(-length // block) for length in lens]
    num_blocks = sum(num_blocks_each) + 1
    shuffled = iter((torch.randperm(num_blocks - 1, generator=source.host) + 1).tolist())
    table = torch.zeros(num_sequences, max(num_blocks_each), dtype=torch.int32)
    for row, count in enumerate(num_blocks_each):
        table[row, :count] = torch.tensor([next(shuffled) for _ in range(count)])
    context = DecodeContext(source.place(table), lens, block)
    cache = ops.make_cache(num_blocks * block, block, (shapes.latent, shapes.rope), source.dtype, source.device)
    latents_SC, ropes_SD = (source.normal(num_blocks * block, width) for width in (shapes.latent, shapes.rope))
    for tensor in cache.tensors:
        source.count(tensor)
    slots_S = torch.arange(num_blocks * block, device=source.device)
    cache.write_(slots_S, latents_SC, ropes_SD)
    query_BHC = source.normal(num_sequences, shapes.num_heads, shapes.latent)
    query_BHD = source.normal(num_sequences, shapes.num_heads, shapes.rope)

    def expected(exact: Exact) -> Results:
        latents, ropes = exact(latents_SC), exact(ropes_SD)
        joint = LatentCache(latents, ropes, block, torch.cat((latents, ropes), dim=1))
        placed = DecodeContext(exact(context.block_table_BN), lens, block)
        return (reference.mla_decode(exact(query_BHC), exact(query_BHD), joint, placed, shapes.scale),)

    num_keys = sum(lens) * shapes.num_heads
    return Prepared(
        described(("query", (*query_BHC.shape[:2], shapes.latent + shapes.rope))) + f", contexts up to {longest}",
        run=lambda: (ops.mla_decode(query_BHC, query_BHD, cache, context, shapes.scale),),
        reference=expected,
        moved_bytes=num_bytes(query_BHC) * 2 + num_bytes(query_BHD)
        + sum(lens) * (shapes.latent + shapes.rope) * query_BHC.element_size(),
        flops=2 * num_keys * (2 * shapes.latent + shapes.rope),
        workspace_bytes=num_sequences * longest * (8 * (shapes.latent + shapes.rope) + 16 * shapes.num_heads),
    )


def _attend_block(shapes: Shapes, ops: Ops, source: Source, *, causal: bool) -> Prepared:
    num_queries, num_heads = shapes.chunk_tokens, shapes.num_heads
    num_keys = num_queries if causal else 2 * num_queries
    q, q_rope = (source.normal(num_queries, num_heads, width) for width in (shapes.nope, shapes.rope))
    k, value = (source.normal(num_keys, num_heads, width) for width in (shapes.nope, shapes.value))
    k_rope = source.normal(num_keys, shapes.rope)

    def expected(exact: Exact) -> Results:
        queries, keys = (exact(q), exact(q_rope)), (exact(k), exact(k_rope))
        return reference.attend_block(*queries, *keys, exact(value), shapes.scale, causal=causal)

    num_pairs = num_queries * num_keys * num_heads // (2 if causal else 1)
    return Prepared(
        described(("query", (num_queries, num_heads, shapes.nope + shapes.rope))) + f", {num_keys} keys",
        run=lambda: ops.attend_block(q, q_rope, k, k_rope, value, shapes.scale, causal=causal),
        reference=expected,
        moved_bytes=num_bytes(q, q_rope, k, k_rope, value) + 4 * num_queries * num_heads * (shapes.value + 1),
        flops=2 * num_pairs * (shapes.nope + shapes.rope + shapes.value),
        workspace_bytes=16 * num_queries * num_keys * num_heads,
    )


def _attention(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    num_tokens, num_heads, width = shapes.training_tokens, shapes.num_heads, shapes.nope + shapes.rope
    query, key = (source.normal(1, num_heads, num_tokens, width) for _ in range(2))
    value, grad = (source.normal(1, num_heads, num_tokens, shapes.value) for _ in range(2))

    def expected(exact: Exact) -> Results:
        attend = partial(reference.attention, scale=shapes.scale)
        return _with_gradients(attend, exact(grad), exact(query), exact(key), exact(value))

    num_pairs = num_tokens * num_tokens * num_heads // 2
    return Prepared(
        described(("query", query.shape), ("value", value.shape)),
        run=lambda: _with_gradients(partial(ops.attention, scale=shapes.scale), grad, query, key, value),
        reference=expected,
        moved_bytes=2 * num_bytes(query, key, value, grad),
        flops=7 * num_pairs * (width + shapes.value),
        workspace_bytes=32 * num_tokens * num_tokens * num_heads,
    )
