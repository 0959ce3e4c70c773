"""Rotation and the paged cache on the bench, against rotation by complex numbers and plain indexing."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.nn import functional

from tests.npu.real_meta import run_as_meta_says

BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def angles(*shape: int) -> Tensor:
    return torch.rand(*shape, 32) * 6


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (even, odd) as complex numbers, turned; the result as real parts, then imaginary parts."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat(((pairs * torch.polar(torch.ones_like(angle), angle)).real,
                      (pairs * torch.polar(torch.ones_like(angle), angle)).imag), -1)


def cos_sin(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.cat((angle.cos(), angle.cos()), -1).to(dtype), torch.cat((angle.sin(), angle.sin()), -1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [1, 5])
def test_interleave_rope_turns_pairs_and_writes_halves(dtype: torch.dtype, positions: int) -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 64).to(dtype), angles(2, 1, positions)
    out = run_as_meta_says("npu_interleave_rope", x, *cos_sin(angle, dtype))
    torch.testing.assert_close(out.float(), turned(x, angle), rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def test_rotary_mul_keeps_the_layout_in_both_modes() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 64), angles(1, 1, 5)
    by_halves = turned(x, angle)
    in_halves = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    out = run_as_meta_says("npu_rotary_mul", in_halves, *cos_sin(angle, torch.float32))
    torch.testing.assert_close(out, by_halves, rtol=1e-5, atol=1e-5)
    cos, sin = (part[..., :32].repeat_interleave(2, -1) for part in cos_sin(angle, torch.float32))
    pairs = run_as_meta_says("npu_rotary_mul", x, cos, sin, rotary_mode="interleave")
    torch.testing.assert_close(torch.cat((pairs[..., ::2], pairs[..., 1::2]), -1), by_halves, rtol=1e-5, atol=1e-5)


def test_rotary_muls_gradient_turns_back() -> None:
    torch.manual_seed(0)
    x, grad, angle = torch.randn(1, 2, 5, 64, requires_grad=True), torch.randn(1, 2, 5, 64), angles(1, 1, 5)
    cos, sin = cos_sin(angle, torch.float32)
    (found,) = torch.autograd.grad(torch_npu.npu_rotary_mul(x, cos, sin), x, grad)
    torch.testing.assert_close(found, torch_npu.npu_rotary_mul(grad, cos, -sin), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["", "_v2"])
def test_latents_are_normed_turned_and_written_at_their_slots_only(version: str) -> None:
    torch.manual_seed(0)
    kv, gamma, angle = torch.randn(3, 1, 1, 576).bfloat16(), torch.randn(512).bfloat16(), angles(3, 1, 1)
    rope_cache, latent_cache = (torch.full((4, 16, 1, width), 7.0).bfloat16() for width in (64, 512))
    slots = torch.tensor([5, 17, 63])
    results = run_as_meta_says(f"npu_kv_rmsnorm_rope_cache{version}", kv, gamma, *cos_sin(angle, torch.bfloat16), slots,
                               rope_cache, latent_cache, cache_mode="PA", epsilon=1e-6, is_output_kv=True)
    latents = functional.rms_norm(kv[:, 0, 0, :512].float(), (512,), gamma.float(), 1e-6)
    ropes = turned(kv[:, 0, 0, 512:], angle[:, 0, 0])
    for cache, wanted in ((latent_cache, latents), (rope_cache, ropes)):
        flat = cache.view(64, -1).float()
        torch.testing.assert_close(flat[slots], wanted, rtol=3e-2, atol=3e-2)
        untouched = [slot for slot in range(64) if slot not in slots.tolist()]
        assert (flat[untouched] == 7).all()
    torch.testing.assert_close(results[-1][:, 0, 0].float(), latents, rtol=3e-2, atol=3e-2)


def test_parts_that_were_not_asked_for_are_nan() -> None:
    kv, gamma, angle = torch.randn(1, 1, 1, 576).bfloat16(), torch.ones(512).bfloat16(), angles(1, 1, 1)
    caches = torch.zeros(2, 16, 1, 64).bfloat16(), torch.zeros(2, 16, 1, 512).bfloat16()
    results = run_as_meta_says("npu_kv_rmsnorm_rope_cache", kv, gamma, *cos_sin(angle, torch.bfloat16),
                               torch.tensor([3]), *caches, cache_mode="PA_BNSD")
    assert results[2].isnan().all() and results[3].isnan().all() and not caches[1].isnan().any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_scatter_writes_rows_in_place(index_dtype: torch.dtype) -> None:
    cache, rows = torch.zeros(8, 4), torch.randn(3, 4)
    run_as_meta_says("npu_scatter_nd_update_", cache, torch.tensor([[6], [0], [3]], dtype=index_dtype), rows)
    torch.testing.assert_close(cache[[6, 0, 3]], rows)
    assert not cache[[1, 2, 4, 5, 7]].any()


def test_gathering_a_paged_cache_lays_sequences_one_after_the_other() -> None:
    """torch_npu has no meta function for this operator: it writes into tensors that the caller gives."""
    keys, values = torch.randn(6, 16, 1, 8), torch.randn(6, 16, 1, 4)
    key, value = torch.zeros(30, 1, 8), torch.zeros(30, 1, 4)
    tables = torch.tensor([[4, 0], [2, 5]], dtype=torch.int32)
    torch_npu.npu_gather_pa_kv_cache(keys, values, tables, torch.tensor([5, 20], dtype=torch.int32), key, value)
    for out, cache in ((key, keys), (value, values)):
        torch.testing.assert_close(out[:25], torch.cat((cache[4, :5], cache[2], cache[5, :4])))
        assert not out[25:].any()
