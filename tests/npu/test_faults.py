"""One deliberate fault of each kind, and the refusal that names operator, argument, value and limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.npu.bench import BenchError, on_host
from tests.npu.real_meta import causal_mask


def grouped(x: Tensor, weight: Tensor | list[Tensor], group_list: object, **changed: Any) -> Tensor:
    options = {"group_type": 0, "split_item": 2, "group_list_type": 1} | changed
    weights = weight if isinstance(weight, list) else [weight]
    result: Tensor = torch_npu.npu_grouped_matmul([x], weights, group_list=group_list, **options)[0]
    return result


def counts(*values: int) -> Tensor:
    return torch.tensor(values)


X, W, C = torch.randn(8, 16), torch.randn(2, 16, 4), counts(5, 3)

GROUPED_FAULTS = {
    "1,025 groups": (lambda: grouped(X, torch.randn(1025, 16, 1), torch.zeros(1025, dtype=torch.int64)),
                     "number of groups = 1025, but it must be <= 1024"),
    "129 matrices in a list": (
        lambda: grouped(X.bfloat16(), [W[0].bfloat16()] * 129, torch.zeros(129, dtype=torch.int64)),
        r"len\(weight\) = 129, but it must be <= 128"),
    "int32 group list": (lambda: grouped(X, W, C.int()),
                         "group_list.dtype = torch.int32, but it must be one of torch.int64"),
    "group list in Python": (lambda: grouped(X, W, [5, 3]),
                             r"group_list = \[5, 3\], but it must be an int64 tensor on the dev"),
    "group list in host memory": (lambda: grouped(X, W, on_host(counts(5, 3))),
                                  "memory = host, but all tensors must lie on"),
    "group list of another length": (lambda: grouped(X, W, counts(5, 2, 1)),
                                     r"len\(group_list\) = 3, .* number of groups, 2"),
    "group list with two axes": (lambda: grouped(X, W, torch.zeros(2, 2, dtype=torch.int64)),
                                 r"group_list.dim\(\) = 2"),
    "list of one count": (lambda: grouped(X, W[:1], counts(8)), "must have more than one group"),
    "no group list": (lambda: grouped(X, W, None), "without a group list|group_type 0 needs it"),
    "more rows than there are": (lambda: grouped(X, W, counts(5, 4)), "sum of group_list = 9, but x has 8 rows"),
    "no rows at all": (lambda: grouped(X[:0], W, counts(0, 0)), "rows of x = 0"),
    "no rows, split over them": (
        lambda: grouped(X[:0].t(), torch.randn(0, 4), counts(0, 0), group_type=2, split_item=3), "rows of x = 0"),
    "negative count": (lambda: grouped(X, W, counts(9, -1)), "counts must not be negative"),
    "cumulative list that falls": (lambda: grouped(X, W, counts(5, 3), group_list_type=0), "must not decrease"),
    "sparse group list": (lambda: grouped(X, W, C, group_list_type=2), "group_list_type = 2"),
    "inner axis of the weight of 65,536": (lambda: grouped(torch.randn(8, 1), torch.zeros(2, 1, 65536), C),
                                           "inner axis of weight = 65536, but it must be <= 65535"),
    "inner axis of a transposed weight of 65,536": (
        lambda: grouped(torch.zeros(8, 65536), torch.zeros(2, 1, 65536).transpose(1, 2), C), "inner axis of"),
    "split_item 0": (lambda: grouped(X, W, C, split_item=0), "split_item = 0, but it must be one of 2, 3"),
    "group_type 1": (lambda: grouped(X, W, C, group_type=1), "group_type = 1, but it must be one of -1, 0, 2"),
    "float16 rows with bfloat16 weights": (lambda: grouped(X.half(), W.bfloat16(), C),
                                           "dtype = torch.bfloat16, but .*float16"),
    "float32 list": (lambda: grouped(X, [W[0], W[1]], C), "lists of tensors must be 16 bit wide"),
    "another output type": (lambda: grouped(X.bfloat16(), W.bfloat16(), C, output_dtype=torch.float32), "output_dtype"),
    "an activation": (lambda: grouped(X, W, C, act_type=5), "act_type = 5"),
    "unpacked rows": (lambda: grouped(torch.randn(8, 32)[:, ::2], W, C),
                      r"x.stride\(\) = \(32, 2\), but it must be contiguous"),
    "columns of a wider weight": (lambda: grouped(X, torch.randn(2, 16, 8)[:, :, :4], C), r"weight.stride\(\)"),
    "weight with its groups inside": (lambda: grouped(X, torch.randn(16, 2, 4).transpose(0, 1), C),
                                      r"weight.stride\(\)"),
    "bias of the wrong type": (lambda: grouped(X.bfloat16(), W.bfloat16(), C, bias=[torch.zeros(2, 4).bfloat16()]),
                               "bias.dtype"),
    "untransposed rows, split over them": (
        lambda: grouped(torch.randn(16, 8), torch.randn(8, 4), C, group_type=2, split_item=3),
        "group_type 2 needs the transposed view"),
    "transposed gradient, split over rows": (
        lambda: grouped(X.t(), torch.randn(4, 8).t(), C, group_type=2, split_item=3), "must not have it transposed"),
    "bias, split over rows": (
        lambda: grouped(X.t(), torch.randn(8, 4), C, group_type=2, split_item=3, bias=[torch.zeros(2, 4)]),
        "bias = given"),
    "gradient through npu_grouped_matmul": (lambda: grouped(X.clone().requires_grad_(), W, C), "no derivative"),
    "counts for the adding form": (
        lambda: torch_npu.npu_grouped_matmul_add_(torch.zeros(2, 16, 4), X.half(), torch.ones(8, 4).half(), C,
                                                  group_list_type=1),
        "group_list_type = 1"),
    "float32 rows for the adding form": (
        lambda: torch_npu.npu_grouped_matmul_add_(torch.zeros(2, 16, 4), X, torch.ones(8, 4), C.cumsum(0)), "x.dtype"),
}


@pytest.mark.parametrize("fault", GROUPED_FAULTS)
def test_a_faulty_grouped_product_is_refused(fault: str) -> None:
    call, message = GROUPED_FAULTS[fault]
    with pytest.raises(BenchError, match=message):
        call()


def test_rows_with_a_gap_between_their_groups_end_in_nan() -> None:
    """The device takes rows as packed, whatever lies between: padding is read as rows, the last rows are left out."""
    y = grouped(torch.cat((X[:5], torch.zeros(3, 16), X[5:])), W, C)
    assert y[8:].isnan().all()


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def gate(experts: int = 64, **options: Any) -> object:
    return torch_npu.npu_moe_gating_top_k(torch.randn(2, experts), options.pop("k", 4), **options)


def route(experts: Tensor, num: int = 4, **changed: Any) -> object:
    options = {"active_num": experts.numel(), "expert_num": num, "expert_tokens_num_flag": True} | changed
    return torch_npu.npu_moe_init_routing_v2(torch.randn(len(experts), 8), experts, **options)


def finalize(rows: Tensor, scales: Tensor, index: list[int], mode: int = 2) -> object:
    places = torch.tensor(index, dtype=torch.int32)
    return torch_npu.npu_moe_finalize_routing(rows, None, None, None, scales, places, None, drop_pad_mode=mode)


IDS = torch.zeros(3, 2, dtype=torch.int32)

ROUTING_FAULTS = {
    "too many experts": (lambda: gate(2049), "experts = 2049"),
    "groups of two": (lambda: gate(64, group_count=32), "experts of a group = 2, but there must be more than 2"),
    "groups that do not divide": (lambda: gate(64, group_count=7), "group_count = 7"),
    "groups too wide when aligned to 32": (lambda: gate(195, k=2, group_count=65), "groups aligned to 32 = 2080"),
    "more choices than kept experts": (lambda: gate(64, k=9, group_count=8), "k = 9, but it must lie in 1..8"),
    "bias of another type": (lambda: gate(64, bias=half(64)), "bias.dtype = torch.bfloat16"),
    "renormalising first": (lambda: gate(64, renorm=1), "renorm = 1"),
    "int64 experts": (lambda: route(IDS.long()), "expert_idx.dtype = torch.int64"),
    "an expert out of range": (lambda: route(IDS + 4), "ids lie in 0..3"),
    "10,241 experts": (lambda: route(IDS, 10241), "expert_num = 10241"),
    "a range past the end": (lambda: route(IDS, active_expert_range=[2, 5]), "active_expert_range"),
    "fewer active rows": (lambda: route(IDS, active_num=3), "active_num = 3"),
    "no counts": (lambda: route(IDS, expert_tokens_num_flag=False), "expert_tokens_num_flag"),
    "scales of another type": (lambda: finalize(half(6, 8), torch.ones(3, 2), [0] * 6), "scales.dtype = torch.float32"),
    "no row, without dropping": (lambda: finalize(half(6, 8), half(3, 2), [0, 1, 2, 3, 4, -1]), "mode 2 takes 0..5"),
    "fewer experts than choices": (lambda: finalize(half(1, 6, 8), half(3, 2), [0] * 6, 3),
                                   "E = 1, but it must be >= K"),
}


@pytest.mark.parametrize("fault", ROUTING_FAULTS)
def test_faulty_routing_is_refused(fault: str) -> None:
    call, message = ROUTING_FAULTS[fault]
    with pytest.raises(BenchError, match=message):
        call()


def write(slots: list[int], **changed: Any) -> object:
    count = len(slots)
    given = {"kv": half(count, 1, 1, 576), "gamma": half(512), "cos": half(count, 1, 1, 64),
             "sin": half(count, 1, 1, 64), "index": torch.tensor(slots),
             "k_cache": half(2, 16, 1, 64), "ckv_cache": half(2, 16, 1, 512)} | changed
    mode = given.pop("cache_mode", "PA")
    return torch_npu.npu_kv_rmsnorm_rope_cache(*given.values(), cache_mode=mode)


def rope(width: int = 64, cos: Tensor | None = None, x: Tensor | None = None) -> object:
    cos = half(1, 1, 3, width) if cos is None else cos
    return torch_npu.npu_interleave_rope(half(1, 2, 3, width) if x is None else x, cos, cos)


def turn(shape: tuple[int, ...], angles: tuple[int, ...], mode: str = "half") -> object:
    return torch_npu.npu_rotary_mul(half(*shape), half(*angles), half(*angles), mode)


ROPE_FAULTS = {
    "rope width of 32": (lambda: rope(32), "D = 32, but it must be 64"),
    "float32 rope": (lambda: rope(x=torch.randn(1, 2, 3, 64)), "x.dtype = torch.float32"),
    "float32 angles": (lambda: rope(cos=torch.randn(1, 1, 3, 64)), "cos.dtype = torch.float32"),
    "angles of half the width": (lambda: rope(cos=half(1, 1, 3, 32)), "cos.shape"),
    "a view of wider rows": (lambda: rope(x=half(1, 2, 3, 192)[..., 128:]), r"x.stride\(\)"),
    "1,000 documents": (lambda: turn((1000, 2, 3, 64), (1, 1, 3, 64)), r"B, N = \[\(1000, 2\)\], but it must"),
    "500 documents of two heads in pairs": (lambda: turn((500, 2, 3, 64), (1, 1, 3, 64), "interleave"), "B N = "),
    "angles of each document in pairs": (lambda: turn((5, 2, 3, 64), (5, 1, 3, 64), "interleave"), "B N = "),
    "angles of each head": (lambda: turn((5, 2, 3, 64), (1, 2, 3, 64)), "B, N = "),
    "gradient through npu_interleave_rope": (lambda: rope(x=half(1, 2, 3, 64).requires_grad_()), "no derivative"),
    "a repeated slot": (lambda: write([3, 3]), "a slot must not be repeated"),
    "a slot past the cache": (lambda: write([3, 32]), "slots lie in 0..31"),
    "int32 slots": (lambda: write([3], index=torch.tensor([3], dtype=torch.int32)), "index.dtype = torch.int32"),
    "another latent width": (lambda: write([3], kv=half(1, 1, 1, 96)), "kv.shape"),
    "a float32 cache": (lambda: write([3], k_cache=torch.zeros(2, 16, 1, 64)), "k_cache.dtype"),
    "a cache inside a joint buffer": (lambda: write([3], ckv_cache=half(2, 16, 1, 576)[..., :512]),
                                      r"ckv_cache.stride\(\)"),
    "an unmodelled cache mode": (lambda: write([3], cache_mode="Norm"), "cache_mode = Norm"),
    "a repeated row": (lambda: torch_npu.npu_scatter_nd_update_(half(4, 2), torch.tensor([[1], [1]]), half(2, 2)),
                       "repeated"),
    "rows without their axis": (lambda: torch_npu.npu_scatter_nd_update_(half(4, 2), counts(1, 2), half(2, 2)),
                                "indices"),
    "gradient through npu_add_rms_norm": (
        lambda: torch_npu.npu_add_rms_norm(half(2, 4).requires_grad_(), half(2, 4), half(4)), "no derivative"),
    "norm with a weight of another type": (lambda: torch_npu.npu_rms_norm(half(2, 4), torch.ones(4)), "gamma.dtype"),
    "an odd gate": (lambda: torch_npu.npu_swiglu(half(2, 5)), "it must be even"),
    "an unaligned FRACTAL_NZ": (lambda: torch_npu.npu_format_cast(half(32, 24), 29), "FRACTAL_NZ needs multiples"),
    "a float32 FRACTAL_NZ": (lambda: torch_npu.npu_format_cast(torch.ones(32, 32), 29), "input.dtype"),
    "17 parts": (lambda: torch_npu.npu_attention_update([torch.zeros(1)] * 17, [torch.zeros(1, 8)] * 17, 0),
                 r"len\(lse\) = 17"),
    "too wide a batch": (
        lambda: torch_npu.npu_transpose_batchmatmul(half(1, 128, 512), half(128, 512, 16), perm_x1=[1, 0, 2]),
        "B K = 65536"),
}


@pytest.mark.parametrize("fault", ROPE_FAULTS)
def test_a_faulty_rotation_norm_or_write_is_refused(fault: str) -> None:
    call, message = ROPE_FAULTS[fault]
    with pytest.raises(BenchError, match=message):
        call()


def decode(**changed: Any) -> object:
    heads = changed.pop("heads", 4)
    latents = changed.pop("latents", half(4, 1, 16, 512))
    given = {"query_rope": half(2, heads, 64), "key_rope": half(4, 1, 16, 64), "block_size": 16, "num_heads": heads,
             "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), "num_key_value_heads": 1, "scale": 0.1,
             "actual_seq_lengths": [1, 2], "actual_seq_lengths_kv": [3, 20], "input_layout": "TND"} | changed
    return torch_npu.npu_fused_infer_attention_score(half(2, heads, 512), latents, latents, **given)


def prefill(dtype: torch.dtype = torch.bfloat16, width: int = 128, **changed: Any) -> object:
    query, key, value = (torch.randn(5, 2, width).to(dtype) for _ in range(3))
    rope = torch.randn(5, 2, 64).to(dtype)
    given = {"query_rope": rope, "key_rope": rope, "num_heads": 2, "num_key_value_heads": 2, "scale": 0.1,
             "sparse_mode": 3, "atten_mask": causal_mask(), "actual_seq_lengths": [2, 5],
             "actual_seq_lengths_kv": [2, 5],
             "input_layout": "TND"} | changed
    return torch_npu.npu_fused_infer_attention_score(query, key, value, **given)


def fuse(**changed: Any) -> object:
    given = {"head_num": 2, "input_layout": "BNSD", "sparse_mode": 2, "atten_mask": causal_mask()} | changed
    value = given.pop("value", torch.randn(1, 2, 4, 8))
    return torch_npu.npu_fusion_attention(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), value, **given)


ATTENTION_FAULTS = {
    "three heads": (lambda: decode(heads=3), "num_heads = 3"),
    "as many key heads as queries": (lambda: decode(num_key_value_heads=0), "num_key_value_heads = 0"),
    "blocks of 24": (lambda: decode(block_size=24), "block_size = 24, but it must be a multiple of 16"),
    "blocks of 2,048": (lambda: decode(block_size=2048), "block_size = 2048"),
    "an int64 block table": (lambda: decode(block_table=torch.tensor([[0, 1], [2, 3]])),
                             "block_table.dtype = torch.int64"),
    "a block that is not there": (lambda: decode(block_table=torch.tensor([[0, 1], [2, 9]], dtype=torch.int32)),
                                  "blocks in 0..3"),
    "too few blocks": (lambda: decode(actual_seq_lengths_kv=[3, 33]), "33 tokens need blocks"),
    "lengths that are not cumulative": (lambda: decode(actual_seq_lengths=[1, 1]), "must be cumulative"),
    "no lengths": (lambda: decode(actual_seq_lengths_kv=None), "a paged cache needs it"),
    "tokens beyond the lengths": (lambda: decode(actual_seq_lengths=[1], actual_seq_lengths_kv=[3]),
                                  "number of tokens, 2"),
    "the wrong layout": (lambda: decode(input_layout="BNSD"), r"query.dim\(\) = 3, but input_layout is BNSD"),
    "an unknown layout": (lambda: decode(input_layout="NTD"), "input_layout = NTD"),
    "a cache without its head axis first": (lambda: decode(latents=half(4, 16, 1, 512)), "key.shape"),
    "a mask for single tokens": (lambda: decode(atten_mask=causal_mask()), "atten_mask = given"),
    "log-sum-exp of latents": (lambda: decode(softmax_lse_flag=True), "softmax_lse_flag"),
    "no rope part": (lambda: decode(query_rope=None, key_rope=None), "D = 512 needs it"),
    "half the rope": (lambda: decode(key_rope=None), "both or neither"),
    "float32 attention": (lambda: prefill(torch.float32), "query.dtype = torch.float32"),
    "float16 in packed sequences": (lambda: prefill(torch.float16), "query.dtype = torch.float16"),
    "heads of 64": (lambda: prefill(width=64), "D of query = 64"),
    "a small mask": (lambda: prefill(atten_mask=torch.ones(5, 5, dtype=torch.bool).triu(1)), "atten_mask.shape"),
    "the mask upside down": (lambda: prefill(atten_mask=causal_mask().T.contiguous()), "1 above the diagonal"),
    "no mask": (lambda: prefill(atten_mask=None), "causal modes need"),
    "a full mask": (lambda: prefill(sparse_mode=1), "sparse_mode = 1"),
    "grouped heads": (lambda: prefill(num_key_value_heads=1), "they must be equal"),
    "training in another layout": (lambda: fuse(input_layout="BSND"), "input_layout = BSND"),
    "training with a narrower value": (lambda: fuse(value=torch.randn(1, 2, 4, 4)), "value.shape"),
    "training without a mask": (lambda: fuse(atten_mask=None), "causal modes need"),
    "dropout": (lambda: fuse(keep_prob=0.9), "keep_prob = 0.9"),
}


@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_faulty_attention_is_refused(fault: str) -> None:
    call, message = ATTENTION_FAULTS[fault]
    with pytest.raises(BenchError, match=message):
        call()
