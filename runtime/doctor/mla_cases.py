"""What latent attention does with its input before it decodes; suffixes as in `runtime/ops/mla_weights.py`."""

from __future__ import annotations

from functools import cache as once

import torch

from runtime.doctor.attention_cases import EPS, exact_rotation, random_rotation
from runtime.doctor.case import Case, Exact, Prepared, Results, Source, described, num_bytes
from runtime.doctor.shapes import Shapes
from runtime.ops import reference
from runtime.ops.base import Ops
from runtime.ops.latent_cache import LatentCache
from runtime.ops.mla_weights import MlaWeights, QueryLatent


def mla_cases() -> list[Case]:
    """Of `decode_queries` with `pack_mla`."""
    return [Case("decode_queries", "decode", _decode_queries, also=("pack_mla",))]


def _decode_queries(shapes: Shapes, ops: Ops, source: Source) -> Prepared:
    num_tokens, widths = shapes.decode_tokens, (shapes.latent, shapes.rope)
    num_slots = (-(-num_tokens // shapes.block_tokens) + 2) * shapes.block_tokens
    x_TK = source.normal(num_tokens, shapes.hidden)
    weights = _weights(shapes, source)
    slots_T = source.place(torch.randperm(num_slots, generator=source.host)[:num_tokens])
    rotation = random_rotation(shapes, source, num_tokens)
    cache = ops.make_cache(num_slots, shapes.block_tokens, widths, source.dtype, source.device)
    for tensor in cache.tensors:
        source.count(tensor)

    @once
    def packed() -> MlaWeights:
        return ops.pack_mla(weights)

    def run() -> Results:
        queries = ops.decode_queries(x_TK, packed(), rotation, cache, slots_T)
        return *queries, cache.latent_SC, cache.rope_SD

    def expected(exact: Exact) -> Results:
        x, turned = exact(x_TK), exact_rotation(exact, rotation)
        latent = weights.query_latent
        query_TR = x
        if latent is not None:
            query_TR = reference.rms_norm(x @ exact(latent.down_RK).T, exact(latent.norm_R), EPS)
        query_THX = (query_TR @ exact(weights.query_up_OR).T).view(num_tokens, shapes.num_heads, -1)
        absorbed_THC = torch.einsum("thn,hnc->thc", query_THX[..., : shapes.nope], exact(weights.key_up_HNC))
        filled = LatentCache.joint(num_slots, shapes.block_tokens, widths, x.dtype, x.device)
        kv_TX = x @ exact(weights.kv_down_XK).T
        reference.write_latents(filled, kv_TX, exact(weights.kv_norm_C), EPS, turned, exact(slots_T))
        rotated_THD = reference.rotate_interleaved(query_THX[..., shapes.nope :], turned)
        return absorbed_THC, rotated_THD, filled.latent_SC, filled.rope_SD

    matrices = [weights.query_up_OR, weights.key_up_HNC, weights.kv_down_XK]
    if weights.query_latent is not None:
        matrices.append(weights.query_latent.down_RK)
    num_queries = num_tokens * shapes.num_heads * sum(widths)
    return Prepared(
        described(("x", x_TK.shape)) + f", {shapes.num_heads} heads",
        run=run,
        reference=expected,
        moved_bytes=num_bytes(x_TK, *matrices) + (num_queries + num_tokens * sum(widths)) * x_TK.element_size(),
        flops=2 * num_tokens * sum(matrix.numel() for matrix in matrices),
        workspace_bytes=num_bytes(*matrices) + 16 * num_queries,
    )


def _weights(shapes: Shapes, source: Source) -> MlaWeights:
    num_out = shapes.num_heads * (shapes.nope + shapes.rope)

    def drawn(*shape: int) -> torch.Tensor:
        return source.normal(*shape, scale=shape[-1] ** -0.5)

    latent = None
    if shapes.query_latent:
        latent = QueryLatent(drawn(shapes.query_latent, shapes.hidden), source.normal(shapes.query_latent))
    return MlaWeights(
        latent,
        drawn(num_out, shapes.query_latent or shapes.hidden),
        source.normal(shapes.num_heads, shapes.nope, shapes.latent, scale=shapes.nope**-0.5),
        drawn(shapes.latent + shapes.rope, shapes.hidden),
        source.normal(shapes.latent),
        EPS,
    )
