"""npu_mla_prolog_v3 and npu_format_cast on the bench, against plain PyTorch in float32; and what the kernel refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.nn import functional

from tests.npu.bench import BenchError
from tests.npu.bench.formats import FRACTAL_NZ, is_in_fractals
from tests.npu.real_meta import run_as_meta_says

NUM_TOKENS, NUM_HEADS = 3, 2
IN_FRACTALS = ("weight_dq", "weight_uq_qr", "weight_dkv_kr")
SHAPES = {
    "token_x": (NUM_TOKENS, 7168), "weight_dq": (7168, 1536), "weight_uq_qr": (1536, NUM_HEADS * 192),
    "weight_uk": (NUM_HEADS, 128, 512), "weight_dkv_kr": (7168, 576), "rmsnorm_gamma_cq": (1536,),
    "rmsnorm_gamma_ckv": (512,),
}  # fmt: skip
SLOTS = torch.tensor([5, 17, 63])


def _cast(weight: Tensor) -> Tensor:
    cast: Tensor = torch_npu.npu_format_cast(weight, FRACTAL_NZ)
    return cast


@pytest.fixture(scope="module")
def operands() -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {name: torch.randn(shape) * (shape[-2] ** -0.5 if name.startswith("weight") else 1)
            for name, shape in SHAPES.items()}  # fmt: skip
    angle = torch.rand(NUM_TOKENS, 32) * 6
    made |= {"rope_sin": torch.cat((angle.sin(),) * 2, -1), "rope_cos": torch.cat((angle.cos(),) * 2, -1)}
    made = {name: tensor.bfloat16() for name, tensor in made.items()}
    return made | {name: _cast(made[name]) for name in IN_FRACTALS}


def _caches(block_size: int = 16) -> dict[str, Tensor]:
    blocks = 64 // block_size
    return {name: torch.full((blocks, block_size, 1, width), 7.0).bfloat16()
            for name, width in (("kv_cache", 512), ("kr_cache", 64))}  # fmt: skip


def _turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Pairs (even, odd) as complex numbers, turned; real parts, then imaginary parts."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.complex(cos[..., :32].float(), sin[..., :32].float())
    return torch.cat((turned.real, turned.imag), -1)


def test_the_prolog_is_projections_norms_rotations_and_the_cache(operands: dict[str, Tensor]) -> None:
    caches = _caches()
    results = run_as_meta_says("npu_mla_prolog_v3", **operands, **caches, cache_index=SLOTS, rmsnorm_epsilon_cq=1e-6,
                               rmsnorm_epsilon_ckv=1e-6)  # fmt: skip
    exact = {name: tensor.float() for name, tensor in operands.items()}
    latent = functional.rms_norm(exact["token_x"] @ exact["weight_dq"], (1536,), exact["rmsnorm_gamma_cq"], 1e-6)
    query = (latent @ exact["weight_uq_qr"]).view(NUM_TOKENS, NUM_HEADS, 192)
    kv = exact["token_x"] @ exact["weight_dkv_kr"]
    sin, cos = exact["rope_sin"], exact["rope_cos"]
    absorbed = torch.einsum("thn,hnc->thc", query[..., :128], exact["weight_uk"])
    wanted = {
        "query": (results[0], absorbed),
        "rotated query": (results[1], _turned(query[..., 128:], sin[:, None], cos[:, None])),
        "latents": (caches["kv_cache"].view(64, 512)[SLOTS],
                    functional.rms_norm(kv[:, :512], (512,), exact["rmsnorm_gamma_ckv"], 1e-6)),
        "keys": (caches["kr_cache"].view(64, 64)[SLOTS], _turned(kv[:, 512:], sin, cos)),
    }  # fmt: skip
    for name, (seen, expected) in wanted.items():
        allowed = 1e-2 * expected.abs().max().item()
        torch.testing.assert_close(
            seen.float(), expected, atol=allowed, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    untouched = [slot for slot in range(64) if slot not in SLOTS.tolist()]
    assert all((cache.flatten(0, 1)[untouched] == 7).all() for cache in caches.values())
    assert all(result.isnan().all() for result in results[2:])


def test_the_querys_latent_is_given_when_asked_for(operands: dict[str, Tensor]) -> None:
    results = run_as_meta_says("npu_mla_prolog_v3", **operands, **_caches(), cache_index=SLOTS, query_norm_flag=True)
    down = operands["token_x"].float() @ operands["weight_dq"].float()
    expected = functional.rms_norm(down, (1536,), operands["rmsnorm_gamma_cq"].float(), 1e-5)
    torch.testing.assert_close(results[3].float(), expected, atol=2e-2, rtol=2e-2)


def _plain(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape).bfloat16()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a weight that was not cast": ({"weight_dq": _plain((7168, 1536))}, "layout of weight_dq = ND"),
    "an absorbed weight that was cast": ({"weight_uk": "cast"}, "layout of weight_uk = FRACTAL_NZ"),
    "a weight as it lies on disk": ({"weight_dq": _plain((1536, 7168)).T}, r"weight_dq.stride"),
    "another hidden size": ({"token_x": _plain((NUM_TOKENS, 2048))}, r"token_x.shape = \[3, 2048\]"),
    "three heads": ({"weight_uk": _plain((3, 128, 512))}, "heads = 3"),
    "no tokens": ({"token_x": _plain((0, 7168))}, "tokens = 0"),
    "tokens in three axes": ({"token_x": _plain((NUM_TOKENS, 1, 7168))}, r"token_x.dim\(\) = 3"),
    "float32": ({"token_x": torch.zeros(NUM_TOKENS, 7168)}, "token_x.dtype"),
    "angles of half the width": ({"rope_sin": _plain((NUM_TOKENS, 32))}, "rope_sin.shape"),
    "blocks of 32": (_caches(32), "block size = 32"),
    "caches in one tensor": ({"kv_cache": _plain((4, 16, 1, 576))[..., :512]}, r"kv_cache.stride"),
    "no slots": ({"cache_index": None}, "cache_index = None"),
    "int32 slots": ({"cache_index": SLOTS.int()}, "cache_index.dtype"),
    "a slot twice": ({"cache_index": torch.tensor([5, 17, 5])}, "must not be repeated"),
    "a slot past the end": ({"cache_index": torch.tensor([5, 17, 64])}, r"slots lie in 0..63"),
    "another cache layout": ({"cache_mode": "PA_NZ"}, "cache_mode = PA_NZ"),
    "quantised": ({"weight_quant_mode": 2}, "weight_quant_mode = 2"),
    "scales": ({"dequant_scale_x": torch.ones(3, 1)}, "dequant_scale_x = given"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_prolog_does_not_take_is_refused(fault: str, operands: dict[str, Tensor]) -> None:
    changes, sentence = FAULTS[fault]
    changes = {name: _cast(operands[name]) if isinstance(value, str) and value == "cast" else value
               for name, value in changes.items()}  # fmt: skip
    with pytest.raises(BenchError, match=sentence):
        torch_npu.npu_mla_prolog_v3(**{**operands, **_caches(), "cache_index": SLOTS, **changes})


def test_a_cast_is_known_through_views_and_products_with_it_are_right() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(32, 48).bfloat16(), torch.randn(5, 32).bfloat16()
    cast = _cast(weight)
    assert torch.ops.npu.get_npu_format(cast.T) == FRACTAL_NZ and not is_in_fractals(weight)
    torch.testing.assert_close(functional.linear(x, cast.T), x @ weight)


@pytest.mark.parametrize("shape", [(30, 48), (32, 40)], ids=str)
def test_a_cast_of_sides_that_would_be_padded_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(BenchError, match="needs multiples of 16"):
        _cast(_plain(shape))
    with pytest.raises(BenchError, match="contiguous"):
        _cast(_plain((64, 32)).T)
