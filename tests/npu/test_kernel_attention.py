"""Attention on the bench, against PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.nn import functional

from tests.npu.real_meta import causal_mask, run_as_meta_says, to_meta

# The arguments of the second version of the operator under the names of the first.
NAMES = {"q_lens": "actual_seq_lengths", "kv_lens": "actual_seq_lengths_kv", "heads": "num_heads", "scale": "scale",
         "lse": "softmax_lse_flag"}
NAMES_V2 = {"q_lens": "actual_seq_qlen", "kv_lens": "actual_seq_kvlen", "heads": "num_query_heads",
            "scale": "softmax_scale", "lse": "return_softmax_lse"}
VERSIONS = {"npu_fused_infer_attention_score": NAMES, "npu_fused_infer_attention_score_v2": NAMES_V2}
CLOSE = {"rtol": 2e-2, "atol": 2e-2}


def attend(operator: str, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    names = VERSIONS[operator]
    result: tuple[Tensor, Tensor] = run_as_meta_says(
        operator, *tensors, **{names.get(name, name): value for name, value in options.items()}
    )
    return result


def halves(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def plain(query_SNX: Tensor, key_LNX: Tensor, value_LNV: Tensor, scale: float, causal: bool) -> Tensor:
    """One sequence by PyTorch: the last query sees all keys where `causal`."""
    query, key, value = (part.float().transpose(0, 1) for part in (query_SNX, key_LNX, value_LNV))
    seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
    out = functional.scaled_dot_product_attention(query, key, value, seen if causal else None, scale=scale)
    return out.transpose(0, 1)


@pytest.mark.parametrize("operator", VERSIONS)
@pytest.mark.parametrize(("causal", "kv_lens"), [(True, [2, 7]), (True, [4, 9]), (False, [3, 5])])
def test_prefill_attends_within_each_sequence(operator: str, causal: bool, kv_lens: list[int]) -> None:
    torch.manual_seed(0)
    q_lens, total = [2, 5], sum(kv_lens)
    query, query_rope = halves(7, 4, 128), halves(7, 4, 64)
    key, key_rope, value = halves(total, 4, 128), halves(total, 4, 64), halves(total, 4, 128)
    out, lse = attend(
        operator, query, key, value, query_rope=query_rope, key_rope=key_rope, heads=4, num_key_value_heads=4, lse=True,
        q_lens=[2, 7], kv_lens=[kv_lens[0], total], scale=0.1, input_layout="TND", sparse_mode=3 if causal else 0,
        atten_mask=causal_mask() if causal else None,
    )
    queries = torch.cat((query, query_rope), -1).split(q_lens)
    keys, values = torch.cat((key, key_rope), -1).split(kv_lens), value.split(kv_lens)
    wanted = [plain(*parts, 0.1, causal) for parts in zip(queries, keys, values, strict=True)]
    torch.testing.assert_close(out.float(), torch.cat(wanted), **CLOSE)
    last = (queries[1][-1].float() * keys[1].float()).sum(-1) * 0.1
    torch.testing.assert_close(lse[-1, :, 0], last.exp().sum(0).log(), rtol=1e-4, atol=1e-4)


def test_heads_first_prefill_gives_the_same_as_tokens_first() -> None:
    torch.manual_seed(0)
    parts = {name: halves(6, 4, width) for name, width in
             (("query", 128), ("key", 128), ("value", 128), ("query_rope", 64), ("key_rope", 64))}
    options = {"heads": 4, "q_lens": [6], "kv_lens": [6], "scale": 0.1, "sparse_mode": 3, "atten_mask": causal_mask()}
    outs = []
    for layout in ("TND", "NTD_TND"):
        laid = {name: part if layout == "TND" else part.transpose(0, 1).contiguous() for name, part in parts.items()}
        tensors = [laid.pop(name) for name in ("query", "key", "value")]
        outs.append(attend("npu_fused_infer_attention_score", *tensors, **laid, input_layout=layout, **options)[0])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)


def test_joint_queries_of_192_go_without_rope_tensors() -> None:
    torch.manual_seed(0)
    query, key, value = halves(5, 2, 192), halves(5, 2, 192), halves(5, 2, 128)
    out, _ = attend("npu_fused_infer_attention_score", query, key, value, heads=2, q_lens=[5], kv_lens=[5], scale=0.1,
                    input_layout="TND", sparse_mode=3, atten_mask=causal_mask())
    torch.testing.assert_close(out.float(), plain(query, key, value, 0.1, True), **CLOSE)


LAYOUTS = {"TND": (lambda x: x, lambda out: out), "TND_NTD": (lambda x: x, lambda out: out.transpose(0, 1)),
           "BNSD": (lambda x: x[:, :, None], lambda out: out[:, :, 0]),
           "BSND": (lambda x: x[:, None], lambda out: out[:, 0]),
           "BNSD_NBSD": (lambda x: x[:, :, None], lambda out: out[:, :, 0].transpose(0, 1)),
           "BSND_NBSD": (lambda x: x[:, None], lambda out: out[:, :, 0].transpose(0, 1))}


@pytest.mark.parametrize("operator", VERSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_attends_over_each_sequences_own_blocks(operator: str, layout: str) -> None:
    torch.manual_seed(0)
    lens, table = [5, 16, 30], torch.tensor([[4, 0], [2, 0], [1, 5]], dtype=torch.int32)
    axes = (16,) if layout.startswith("BSND") else (1, 16)
    latents, ropes = halves(6, *axes, 512), halves(6, *axes, 64)
    latents.view(6, 16, 512)[3], ropes.view(6, 16, 64)[1, 14:] = float("nan"), 0
    latents.view(6, 16, 512)[4, 5:] = float("nan")  # slots past a sequence's end are never read
    query, rope = halves(3, 4, 512), halves(3, 4, 64)
    lay, unlay = LAYOUTS[layout]
    ends = {"q_lens": [1, 2, 3]} if layout.startswith("TND") else {}
    out, _ = attend(operator, lay(query), latents, latents, query_rope=lay(rope), key_rope=ropes, block_table=table,
                    block_size=16, heads=4, num_key_value_heads=1, kv_lens=lens, scale=0.05,
                    input_layout=layout, **ends)
    for row, (blocks, length) in enumerate(zip(table.tolist(), lens, strict=True)):
        latent = latents.view(6, 16, 512)[blocks].flatten(0, 1)[:length]
        keys = torch.cat((latent, ropes.view(6, 16, 64)[blocks].flatten(0, 1)[:length]), -1)
        shared = [part[:, None].expand(-1, 4, -1) for part in (keys, latent)]
        wanted = plain(torch.cat((query[row], rope[row]), -1)[None], *shared, 0.05, False)[0]
        torch.testing.assert_close(unlay(out)[row].float(), wanted, **CLOSE)


def test_several_queries_of_a_sequence_decode_causally() -> None:
    torch.manual_seed(0)
    latents, ropes = halves(4, 1, 16, 512), halves(4, 1, 16, 64)
    query, rope = halves(3, 2, 512), halves(3, 2, 64)
    out, _ = attend("npu_fused_infer_attention_score", query, latents, latents, query_rope=rope, key_rope=ropes,
                    block_table=torch.tensor([[3, 1]], dtype=torch.int32), block_size=16, heads=2,
                    num_key_value_heads=1, q_lens=[3], kv_lens=[20], scale=0.05, input_layout="TND", sparse_mode=3,
                    atten_mask=causal_mask())
    latent = latents[[3, 1], 0].flatten(0, 1)[:20]
    keys = torch.cat((latent, ropes[[3, 1], 0].flatten(0, 1)[:20]), -1)
    shared = [part[:, None].expand(-1, 2, -1) for part in (keys, latent)]
    torch.testing.assert_close(out.float(), plain(torch.cat((query, rope), -1), *shared, 0.05, True), **CLOSE)


@pytest.mark.parametrize("mode", ["compressed", "full", "none"])
def test_training_attention_and_its_gradients_are_pytorchs(mode: str) -> None:
    """The real meta function asks the device for random numbers, so that shapes are held against the document only."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 6, 24, requires_grad=True) for _ in range(3)]
    masks = {"compressed": {"atten_mask": causal_mask(), "sparse_mode": 2},
             "full": {"atten_mask": torch.ones(6, 6, dtype=torch.bool).triu(1)}, "none": {}}
    out, highest, total, _, *numbers = torch_npu.npu_fusion_attention(*parts, 3, "BNSD", scale=0.2, **masks[mode])
    wanted = functional.scaled_dot_product_attention(*parts, is_causal=mode != "none", scale=0.2)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    gradients = [torch.autograd.grad(result, parts, grad) for result in (out, wanted)]
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert highest.shape == total.shape == (2, 3, 6, 8) and highest.dtype == torch.float32
    assert [type(number) for number in numbers] == [int, int, int]


def test_partial_attentions_join_to_the_whole() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(10, 12), torch.randn(12, 16)
    shares = (slice(5), slice(5, 12))
    lse = [scores[:, keys].logsumexp(-1) for keys in shares]
    outs = [scores[:, keys].softmax(-1) @ values[keys] for keys in shares]
    out, joined = run_as_meta_says("npu_attention_update", lse, outs, 1)
    torch.testing.assert_close(out, scores.softmax(-1) @ values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert run_as_meta_says("npu_attention_update", lse, outs, 0)[1].isnan().all()


@pytest.mark.parametrize("exchanged", [False, True])
def test_transpose_batchmatmul_writes_tokens_first(exchanged: bool) -> None:
    x, weight = halves(4, 6, 32), halves(4, 32, 16)
    given = x.transpose(0, 1).contiguous() if exchanged else x
    out = run_as_meta_says("npu_transpose_batchmatmul", given, weight, perm_x1=[1, 0, 2] if exchanged else [0, 1, 2],
                           perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
    torch.testing.assert_close(out.float(), torch.einsum("bmk,bkn->mbn", x.float(), weight.float()), **CLOSE)


def test_a_cast_to_fractal_nz_keeps_the_numbers() -> None:
    weight = halves(4, 32, 16)
    torch.testing.assert_close(torch_npu.npu_format_cast(weight, 29), weight, rtol=0, atol=0)
    assert to_meta(weight).shape == weight.shape
