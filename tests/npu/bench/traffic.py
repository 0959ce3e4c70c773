"""How many bytes an operator moves and how many operations it does, where that is not all of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from tests.npu.bench.registry import tensors_in

Arguments = dict[str, Any]
Rule = Callable[[Arguments, Any], "Traffic"]


class Traffic(NamedTuple):
    """Bytes read and written, and operations (a multiply-add counts as two)."""

    read: int
    written: int
    flops: int


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _rows_and_groups(group_list: Tensor, list_type: int, num_rows: int) -> tuple[int, int]:
    """Rows that take part and groups that have any; a meta list cannot be read: all rows, spread over the groups."""
    if group_list.is_meta:
        return num_rows, min(num_rows, len(group_list))
    counts = group_list.diff(prepend=group_list.new_zeros(1)) if list_type == 0 else group_list
    return int(counts.sum()), int((counts > 0).sum())


def _grouped_matmul(arguments: Arguments, out: list[Tensor]) -> Traffic:
    x, weight = arguments["x"], arguments["weight"]
    group_list, size = arguments["group_list"], x[0].element_size()
    if group_list is None:
        flops = sum(2 * one.shape[0] * one.shape[1] * other.shape[1] for one, other in zip(x, weight, strict=True))
        return Traffic(num_bytes([*x, *weight]), num_bytes(out), flops)
    if arguments["group_type"] == 2:
        inner, num_rows = x[0].shape
        rows, _ = _rows_and_groups(group_list, arguments["group_list_type"], num_rows)
        columns = weight[0].shape[1]
        return Traffic(rows * (inner + columns) * size, num_bytes(out), 2 * rows * inner * columns)
    rows, groups = _rows_and_groups(group_list, arguments["group_list_type"], x[0].shape[0])
    inner, columns = weight[0].shape[-2:]
    read = (rows * inner + groups * inner * columns) * size + num_bytes([group_list])
    return Traffic(read, rows * columns * size, 2 * rows * inner * columns)


def _grouped_matmul_add(arguments: Arguments, out: Tensor) -> Traffic:
    x, weight = arguments["x"], arguments["weight"]
    rows, groups = _rows_and_groups(arguments["group_list"], 0, x.shape[0])
    touched = groups * x.shape[1] * weight.shape[1] * 4
    return Traffic(num_bytes([x, weight]) + touched, touched, 2 * rows * x.shape[1] * weight.shape[1])


def _init_routing(arguments: Arguments, out: tuple[Tensor, ...]) -> Traffic:
    """All choices are sorted; the rows of the active experts are copied."""
    rows, index, counts, _ = out
    num_rows = len(rows)
    if not counts.is_meta:
        num_rows = int(counts[-1] if arguments["expert_tokens_num_type"] == 0 else counts.sum())
    copied = num_rows * rows.shape[1] * rows.element_size()
    return Traffic(num_bytes([arguments["expert_idx"]]) + copied, copied + num_bytes([index, counts]), 0)


def _write_latents(arguments: Arguments, _: object) -> Traffic:
    return Traffic(num_bytes(arguments[name] for name in ("kv", "gamma", "cos", "sin", "index")),
                   num_bytes([arguments["kv"]]), 0)


def _mla_prolog(arguments: Arguments, out: tuple[Tensor, ...]) -> Traffic:
    """Each weight is read once; of the caches each token's slot is written."""
    weights = [arguments[name] for name in ("weight_dq", "weight_uq_qr", "weight_uk", "weight_dkv_kr")]
    others = [arguments[name] for name in ("token_x", "rmsnorm_gamma_cq", "rmsnorm_gamma_ckv", "rope_sin", "rope_cos",
                                           "cache_index")]
    num_tokens, width = arguments["token_x"].shape[0], arguments["weight_dkv_kr"].shape[1]
    cached = num_tokens * width * arguments["kv_cache"].element_size()
    flops = 2 * num_tokens * sum(weight.numel() for weight in weights)
    return Traffic(num_bytes([*weights, *others]), num_bytes(out[:2]) + cached, flops)


def _scatter(arguments: Arguments, _: object) -> Traffic:
    return Traffic(num_bytes([arguments["indices"], arguments["updates"]]), num_bytes([arguments["updates"]]), 0)


def _gather_cache(arguments: Arguments, _: object) -> Traffic:
    outs = [arguments["key"], arguments["value"]]
    copied = num_bytes(outs)
    if not arguments["seq_lens"].is_meta:
        rows = int(arguments["seq_lens"].sum())
        copied = sum(rows * out[:1].numel() * out.element_size() for out in outs)
    return Traffic(copied, copied, 0)


def _infer_attention(query_lens: str, kv_lens: str) -> Rule:
    def rule(arguments: Arguments, out: tuple[Tensor, Tensor]) -> Traffic:
        query, key, value = arguments["query"], arguments["key"], arguments["value"]
        rope = arguments["query_rope"]
        width = query.shape[-1] + (0 if rope is None else rope.shape[-1])
        heads = query.numel() // query.shape[-1]
        own = num_bytes([query, rope, arguments["atten_mask"], arguments["block_table"]])
        if arguments["block_table"] is not None:
            lens = arguments[kv_lens]
            # Queries of all heads of a sequence read its latents once.
            read = own + sum(lens) * width * key.element_size()
            flops = 2 * heads // len(lens) * sum(lens) * (width + value.shape[-1])
        else:
            read = own + num_bytes([key, value, arguments["key_rope"]])
            tokens = out[0].shape[0]
            pairs = _pairs(arguments[query_lens], arguments[kv_lens], causal=arguments["sparse_mode"] == 3)
            flops = 2 * heads // tokens * pairs * (width + value.shape[-1])
        return Traffic(read, num_bytes(tensors_in(out)), flops)

    return rule


def _pairs(query_ends: list[int], kv_ends: list[int], *, causal: bool) -> int:
    """Pairs of query and key that are multiplied, over all sequences, from cumulative lengths."""
    pairs, starts = 0, (0, 0)
    for query_end, kv_end in zip(query_ends, kv_ends, strict=True):
        queries, keys = query_end - starts[0], kv_end - starts[1]
        pairs += queries * keys - (queries * (queries - 1) // 2 if causal else 0)
        starts = (query_end, kv_end)
    return pairs


def _fusion_attention(arguments: Arguments, out: Any) -> Traffic:
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    pairs = _pairs([query.shape[2]], [key.shape[2]], causal=arguments["sparse_mode"] != 0)
    flops = 2 * query.shape[0] * query.shape[1] * pairs * (query.shape[3] + value.shape[3])
    return Traffic(num_bytes([query, key, value, arguments["atten_mask"]]), num_bytes(tensors_in(out)), flops)


def _transpose_batchmatmul(arguments: Arguments, out: Tensor) -> Traffic:
    both = [arguments["input"], arguments["weight"]]
    return Traffic(num_bytes(both), num_bytes([out]), 2 * arguments["input"].numel() * arguments["weight"].shape[2])


def _gathered(indices: str) -> Rule:
    """Rows of a table: those that are read, not the table."""

    def rule(arguments: Arguments, out: Tensor) -> Traffic:
        return Traffic(num_bytes([out, *tensors_in(arguments[indices])]), num_bytes([out]), 0)

    return rule


def _copy(arguments: Arguments, out: Tensor) -> Traffic:
    return Traffic(num_bytes([arguments["src"]]), num_bytes([out]), 0)


TRAFFIC_OF_PYTORCH: dict[str, Rule] = {
    "embedding": _gathered("indices"),
    "index_select": _gathered("index"),
    "index": _gathered("indices"),
    "copy_": _copy,
}
TRAFFIC: dict[str, Rule] = {
    "npu_grouped_matmul": _grouped_matmul,
    "npu_grouped_matmul_add_": _grouped_matmul_add,
    "npu_moe_init_routing_v2": _init_routing,
    "npu_kv_rmsnorm_rope_cache": _write_latents,
    "npu_kv_rmsnorm_rope_cache_v2": _write_latents,
    "npu_mla_prolog_v3": _mla_prolog,
    "npu_scatter_nd_update_": _scatter,
    "npu_gather_pa_kv_cache": _gather_cache,
    "npu_fused_infer_attention_score": _infer_attention("actual_seq_lengths", "actual_seq_lengths_kv"),
    "npu_fused_infer_attention_score_v2": _infer_attention("actual_seq_qlen", "actual_seq_kvlen"),
    "npu_fusion_attention": _fusion_attention,
    "npu_transpose_batchmatmul": _transpose_batchmatmul,
}
