"""The latent cache, decoding and blocks of a prefill against PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime.ops import reference
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.cuda.ops import CudaOps
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.rotation import Rotation

BACK_ENDS = (CpuOps(), CudaOps())
CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_TOKENS, WIDTHS = 6, 4, (8, 2)


def _names(value: object) -> str:
    return type(value).__name__ if isinstance(value, Ops) else str(value)


with_back_ends = pytest.mark.parametrize("ops", BACK_ENDS, ids=_names)
with_caches = pytest.mark.parametrize("make_cache", [LatentCache.joint, LatentCache.apart], ids=["joint", "apart"])


def _filled_cache(make_cache: object) -> LatentCache:
    cache: LatentCache = make_cache(NUM_BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS, WIDTHS, torch.float32, CPU)  # type: ignore[operator]
    slots = torch.arange(NUM_BLOCKS * BLOCK_TOKENS)
    cache.write_(slots, torch.randn(len(slots), WIDTHS[0]), torch.randn(len(slots), WIDTHS[1]))
    return cache


@with_back_ends
@pytest.mark.parametrize("widths", [(10, 7), (4, 9)], ids=["narrow values", "wide values"])
def test_blocks_of_keys_merge_to_plain_attention(ops: Ops, widths: tuple[int, int]) -> None:
    """Against PyTorch's own attention: a context in two blocks, then the chunk itself, causal."""
    torch.manual_seed(2)
    heads, queries, keys, rope = 3, 5, 20, 2
    q, k = torch.randn(queries, heads, widths[0]), torch.randn(keys, heads, widths[0])
    q_rope, k_rope = torch.randn(queries, heads, rope), torch.randn(keys, rope)
    v = torch.randn(keys, heads, widths[1])
    mask = torch.arange(keys)[None] <= torch.arange(keys - queries, keys)[:, None]
    whole_k = torch.cat((k, k_rope[:, None].expand(-1, heads, -1)), dim=-1).transpose(0, 1)
    whole_q = torch.cat((q, q_rope), dim=-1).transpose(0, 1)
    plain = torch.nn.functional.scaled_dot_product_attention
    expected = plain(whole_q, whole_k, v.transpose(0, 1), attn_mask=mask, scale=0.3)
    merged = ops.attend_block(q, q_rope, k[15:], k_rope[15:], v[15:], 0.3, causal=True)
    for start, stop in ((0, 6), (6, 15)):
        block = (k[start:stop], k_rope[start:stop], v[start:stop])
        merged = reference.merge_blocks(*merged, *ops.attend_block(q, q_rope, *block, 0.3, causal=False))
    torch.testing.assert_close(merged[0].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


@with_back_ends
@with_caches
def test_decoding_is_plain_attention_over_each_sequences_blocks(ops: Ops, make_cache: object) -> None:
    """The second sequence is shorter, and what stands in the padded block and past its end is not seen."""
    torch.manual_seed(3)
    cache = _filled_cache(make_cache)
    cache.latent_SC[5 * BLOCK_TOKENS + 3] = float("nan")
    context = DecodeContext(torch.tensor([[3, 0, 2], [5, 0, 0]], dtype=torch.int32), [10, 3], BLOCK_TOKENS)
    slots = ([12, 13, 14, 15, 0, 1, 2, 3, 8, 9], [20, 21, 22])
    query_C, query_D = torch.randn(2, 3, WIDTHS[0]), torch.randn(2, 3, WIDTHS[1])
    seen = ops.mla_decode(query_C, query_D, cache, context, 0.5)
    for row, own in enumerate(slots):
        keys = torch.cat((cache.latent_SC[own], cache.rope_SD[own]), dim=-1)
        query = torch.cat((query_C[row], query_D[row]), dim=-1)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, None], keys.expand(3, -1, -1), cache.latent_SC[own].expand(3, -1, -1), scale=0.5
        )
        torch.testing.assert_close(seen[row], expected[:, 0])


@with_back_ends
@with_caches
def test_written_latents_are_normed_and_rotated_and_other_slots_stay(ops: Ops, make_cache: object) -> None:
    torch.manual_seed(4)
    cache = _filled_cache(make_cache)
    before = cache.read_joint(torch.arange(24))
    kv, weight, angles = torch.randn(3, sum(WIDTHS)), torch.rand(WIDTHS[0]), torch.rand(3, WIDTHS[1] // 2)
    slots = torch.tensor([7, 22, 1])
    ops.write_latents(cache, kv, weight, 1e-6, Rotation(angles.cos(), angles.sin()), slots)
    latent, rope = cache.read(slots)
    normed = kv[:, :8] * (kv[:, :8].pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    torch.testing.assert_close(latent, normed)
    turned = torch.view_as_complex(kv[:, 8:].view(3, -1, 2)) * torch.polar(torch.ones(3, 1), angles)
    torch.testing.assert_close(rope, torch.cat((turned.real, turned.imag), dim=-1))
    others = [slot for slot in range(24) if slot not in slots.tolist()]
    assert torch.equal(cache.read_joint(torch.arange(24))[others], before[others])


@with_back_ends
@pytest.mark.parametrize("num_heads", [None, 3])
def test_rotation_turns_neighbouring_pairs_and_writes_halves(ops: Ops, num_heads: int | None) -> None:
    torch.manual_seed(5)
    shape = (5, 8) if num_heads is None else (5, num_heads, 8)
    x, angles = torch.randn(shape, requires_grad=True), torch.rand(5, 4)
    turned = torch.view_as_complex(x.detach().unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones(5, 4), angles
    ).view(5, *(1,) * (len(shape) - 2), 4)
    seen = ops.rotate_interleaved(x, Rotation(angles.cos(), angles.sin()))
    torch.testing.assert_close(seen, torch.cat((turned.real, turned.imag), dim=-1))
    (grad,) = torch.autograd.grad(seen.square().sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach())


def test_the_wide_form_of_a_rotation_repeats_it_and_is_made_once() -> None:
    rotation = Rotation(torch.rand(3, 2), torch.rand(3, 2))
    cos, sin = rotation.wide(torch.bfloat16)
    assert torch.equal(cos, torch.cat((rotation.cos_TF, rotation.cos_TF), 1).bfloat16())
    assert torch.equal(sin, torch.cat((rotation.sin_TF, rotation.sin_TF), 1).bfloat16())
    assert rotation.wide(torch.bfloat16)[0] is cos


@with_back_ends
def test_a_new_cache_holds_zeros_of_both_widths(ops: Ops) -> None:
    cache = ops.make_cache(24, BLOCK_TOKENS, WIDTHS, torch.bfloat16, CPU)
    parts: list[tuple[Tensor, int]] = [(cache.latent_SC, WIDTHS[0]), (cache.rope_SD, WIDTHS[1])]
    for part, width in parts:
        assert part.shape == (24, width) and part.dtype is torch.bfloat16 and not part.count_nonzero()
