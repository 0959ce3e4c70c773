"""npu_fused_infer_attention_score, both versions: MLA decode on a paged latent cache, prefill of packed sequences.

Shape suffixes: T tokens of all sequences, B sequences, N heads, S positions of one sequence, D widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.npu.bench.limits import (
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

V1 = "npu_fused_infer_attention_score"
V2 = "npu_fused_infer_attention_score_v2"
NUM_ROPE = 64
NUM_LATENT = 512
DECODE_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_DECODE_TOKENS = 16
MAX_PREFILL_HEADS = 256
MAX_SEQUENCES = 4096
MAX_PREFILL_TOKENS = 2**20
MAX_BLOCK_SIZE = 1024
COMPRESSED_MASK = 2048
UNLIMITED = 2147483647
# Without rope tensors: (width of query and key, widths of value).
PREFILL_WIDTHS = {V1: {192: (128, 192)}, V2: {128: (128,), 192: (128, 192)}}


@dataclass(frozen=True)
class Call:
    """The arguments of both versions under one set of names; `q_lens` and `kv_lens` are the host lists as given."""

    operator: str
    query: Tensor
    key: Tensor
    value: Tensor
    query_rope: Tensor | None
    key_rope: Tensor | None
    mask: Tensor | None
    q_lens: Sequence[int] | None
    kv_lens: Sequence[int] | None
    block_table: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float
    layout: str
    sparse_mode: int
    block_size: int
    wants_lse: bool

    def require(self, held: bool, argument: str, value: object, limit: str) -> None:
        require(held, self.operator, argument, value, limit)


@kernel(V1)
def fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, pse_shift: Tensor | None = None, atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None, actual_seq_lengths_kv: Sequence[int] | None = None,
    dequant_scale1: Tensor | None = None, quant_scale1: Tensor | None = None, dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None, quant_offset2: Tensor | None = None, antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None, key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None, value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None, block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None, kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None, value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Sequence[int] | None = None, query_rope: Tensor | None = None,
    key_rope: Tensor | None = None, key_rope_antiquant_scale: Tensor | None = None, num_heads: int = 1,
    scale: float = 1.0, pre_tokens: int = UNLIMITED, next_tokens: int = UNLIMITED, input_layout: str = "BSH",
    num_key_value_heads: int = 0, sparse_mode: int = 0, inner_precise: int = 0, block_size: int = 0,
    antiquant_mode: int = 0, key_antiquant_mode: int = 0, value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    refuse_unmodelled(
        V1, pse_shift=pse_shift, dequant_scale1=dequant_scale1, quant_scale1=quant_scale1,
        dequant_scale2=dequant_scale2, quant_scale2=quant_scale2, quant_offset2=quant_offset2,
        antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset, key_antiquant_scale=key_antiquant_scale,
        key_antiquant_offset=key_antiquant_offset, value_antiquant_scale=value_antiquant_scale,
        value_antiquant_offset=value_antiquant_offset, query_padding_size=query_padding_size,
        kv_padding_size=kv_padding_size, key_shared_prefix=key_shared_prefix, value_shared_prefix=value_shared_prefix,
        actual_shared_prefix_len=actual_shared_prefix_len, key_rope_antiquant_scale=key_rope_antiquant_scale,
    )
    modes = (antiquant_mode, key_antiquant_mode, value_antiquant_mode)
    _require_defaults(V1, modes, pre_tokens, next_tokens, inner_precise)
    return _attend(Call(
        V1, query, key, value, query_rope, key_rope, atten_mask, actual_seq_lengths, actual_seq_lengths_kv, block_table,
        num_heads, num_key_value_heads, scale, input_layout, sparse_mode, block_size, softmax_lse_flag,
    ))


@kernel(V2)
def fused_infer_attention_score_v2(
    query: Tensor, key: Tensor, value: Tensor, *, query_rope: Tensor | None = None, key_rope: Tensor | None = None,
    pse_shift: Tensor | None = None, atten_mask: Tensor | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None, block_table: Tensor | None = None,
    dequant_scale_query: Tensor | None = None, dequant_scale_key: Tensor | None = None,
    dequant_offset_key: Tensor | None = None, dequant_scale_value: Tensor | None = None,
    dequant_offset_value: Tensor | None = None, dequant_scale_key_rope: Tensor | None = None,
    quant_scale_out: Tensor | None = None, quant_offset_out: Tensor | None = None, quant_scale_p: Tensor | None = None,
    learnable_sink: Tensor | None = None, num_query_heads: int = 1, num_key_value_heads: int = 0,
    softmax_scale: float = 1.0, pre_tokens: int = UNLIMITED, next_tokens: int = UNLIMITED, input_layout: str = "BSH",
    sparse_mode: int = 0, block_size: int = 0, query_quant_mode: int = 0, key_quant_mode: int = 0,
    value_quant_mode: int = 0, inner_precise: int = 0, return_softmax_lse: bool = False, **dtypes: int | None,
) -> tuple[Tensor, Tensor]:
    refuse_unmodelled(
        V2, pse_shift=pse_shift, dequant_scale_query=dequant_scale_query, dequant_scale_key=dequant_scale_key,
        dequant_offset_key=dequant_offset_key, dequant_scale_value=dequant_scale_value,
        dequant_offset_value=dequant_offset_value, dequant_scale_key_rope=dequant_scale_key_rope,
        quant_scale_out=quant_scale_out, quant_offset_out=quant_offset_out, quant_scale_p=quant_scale_p,
        learnable_sink=learnable_sink, **dtypes,
    )
    _require_defaults(V2, (query_quant_mode, key_quant_mode, value_quant_mode), pre_tokens, next_tokens, inner_precise)
    return _attend(Call(
        V2, query, key, value, query_rope, key_rope, atten_mask, actual_seq_qlen, actual_seq_kvlen, block_table,
        num_query_heads, num_key_value_heads, softmax_scale, input_layout, sparse_mode, block_size, return_softmax_lse,
    ))


def _require_defaults(operator: str, modes: tuple[int, ...], pre: int, next_tokens: int, inner_precise: int) -> None:
    require(not any(modes), operator, "quantisation modes", modes, "the bench models the unquantised form only")
    require((pre, next_tokens) == (UNLIMITED, UNLIMITED), operator, "pre_tokens, next_tokens", (pre, next_tokens),
            "sparse modes 0 and 3 ignore them")
    # bfloat16 has one precision, and only 0 is documented for it in every place.
    require_one_of(operator, "inner_precise", inner_precise, (0,))


def _attend(call: Call) -> tuple[Tensor, Tensor]:
    given = {"query": call.query, "key": call.key, "value": call.value, "query_rope": call.query_rope,
             "key_rope": call.key_rope, "atten_mask": call.mask, "block_table": call.block_table}
    for name, tensor in given.items():
        if tensor is not None:
            require_contiguous(call.operator, name, tensor)
    for name in ("query", "key", "value", "query_rope", "key_rope"):
        tensor = given[name]
        if tensor is not None:
            require_dtype(call.operator, name, tensor, HALVES)
            require_same_dtype(call.operator, name, tensor, "query", call.query)
    both = (call.query_rope is None) == (call.key_rope is None)
    call.require(both, "query_rope, key_rope", "one of them", "both or neither must be given")
    if call.query_rope is not None:
        require_shape(call.operator, "query_rope", call.query_rope, [*call.query.shape[:-1], NUM_ROPE])
    return _decode(call) if call.query.shape[-1] == NUM_LATENT else _prefill(call)


def _softmax_attention(
    query_NSD: Tensor, key_NLD: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [N, S, V] and log-sum-exp [N, S], float32; `causal`: the last query sees all keys."""
    scores = query_NSD.float() @ key_NLD.float().transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ value.float(), scores.logsumexp(-1)


def require_compressed_mask(operator: str, mask: Tensor | None) -> None:
    """The causal mask of 2048 x 2048 that stands for every length: True above the diagonal."""
    require(mask is not None, operator, "atten_mask", None,
            f"causal modes need the {COMPRESSED_MASK} x {COMPRESSED_MASK} mask")
    assert mask is not None
    require_dtype(operator, "atten_mask", mask, (torch.bool, torch.int8, torch.uint8))
    size = COMPRESSED_MASK
    shapes = ([size, size], [1, size, size], [1, 1, size, size])
    require(list(mask.shape) in shapes, operator, "atten_mask.shape", list(mask.shape), f"it must be [{size}, {size}]")
    upper = torch.ones(size, size, dtype=torch.bool).triu(1)
    require(torch.equal(mask.view(size, size).bool(), upper), operator, "atten_mask", "another matrix",
            "it must be 1 above the diagonal and 0 elsewhere")


def _require_mask(call: Call, causal: bool) -> None:
    if causal:
        require_compressed_mask(call.operator, call.mask)
    else:
        call.require(call.mask is None, "atten_mask", "given",
                     f"sparse_mode {call.sparse_mode} goes without a mask here")


# ---- decode: absorbed MLA, one latent head


def _decode(call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the paged latents; key and value are the same cache of width 512."""
    require_one_of(call.operator, "num_heads", call.num_heads, DECODE_HEADS)
    require_one_of(call.operator, "num_key_value_heads", call.num_kv_heads, (1,))
    layouts = ("TND", "TND_NTD", "BNSD", "BSND", "BNSD_NBSD", "BSND_NBSD")
    require_one_of(call.operator, "input_layout", call.layout, layouts)
    # Some documents say that the log-sum-exp does not exist for this width, others are silent.
    call.require(not call.wants_lse, "softmax_lse_flag", True, f"it must be False for D = {NUM_LATENT}")
    call.require(call.query_rope is not None and call.key_rope is not None, "query_rope", None, "D = 512 needs it")
    assert call.query_rope is not None and call.key_rope is not None
    heads_first = call.layout.startswith("BNSD")
    joint = torch.cat((call.query, call.query_rope), dim=-1)
    call.require(joint.dim() == (3 if call.layout.startswith("TND") else 4), "query.dim()", joint.dim(),
                 f"input_layout is {call.layout}")
    num_heads = joint.shape[1] if heads_first or joint.dim() == 3 else joint.shape[2]
    call.require(num_heads == call.num_heads, "num_heads", call.num_heads, f"query has {num_heads}")
    if joint.dim() == 3:
        rows = _split(joint, _lengths_from_cumulative(call, "actual_seq_lengths", call.q_lens, joint.shape[0]))
    else:
        rows = list(joint.transpose(1, 2) if heads_first else joint)
        call.require(call.q_lens is None or all(length == len(rows[0]) for length in call.q_lens), "actual_seq_lengths",
                     call.q_lens, "the bench models queries without padding")
    longest = max(len(row) for row in rows)
    call.require(1 <= longest <= MAX_DECODE_TOKENS, "tokens of a sequence", longest,
                 f"1..{MAX_DECODE_TOKENS} are possible")
    require_one_of(call.operator, "sparse_mode", call.sparse_mode, (0,) if longest == 1 else (3,))
    _require_mask(call, causal=longest > 1)
    contexts = _paged_contexts(call, [len(row) for row in rows])
    outs = [_softmax_attention(row.transpose(0, 1), context, context[:, :NUM_LATENT], call.scale, causal=True)[0]
            for row, context in zip(rows, contexts, strict=True)]
    return _decoded(call, outs), torch.zeros(0)


def _decoded(call: Call, outs_NSD: list[Tensor]) -> Tensor:
    """Output in the layout that the part after the underscore names."""
    written = call.layout.split("_")[-1]
    if written == "NTD":
        out = torch.cat(outs_NSD, dim=1)
    elif written == "TND":
        out = torch.cat(outs_NSD, dim=1).transpose(0, 1)
    else:
        out = torch.stack(outs_NSD)
        out = {"BNSD": out, "BSND": out.transpose(1, 2), "NBSD": out.transpose(0, 1)}[written]
    return out.to(call.query.dtype).contiguous()


def _paged_contexts(call: Call, q_lens: list[int]) -> list[Tensor]:
    """Each sequence's cached latent and rope parts, [its length, 576]."""
    assert call.key_rope is not None
    call.require(call.block_table is not None, "block_table", None, "the latent cache must be paged")
    assert call.block_table is not None
    size = call.block_size
    call.require(size > 0 and size % 16 == 0 and size <= MAX_BLOCK_SIZE, "block_size", size,
                 f"it must be a multiple of 16 and <= {MAX_BLOCK_SIZE}")
    flat = call.layout.startswith("BSND")
    shape = [size] if flat else [1, size]
    caches = {"key": (call.key, NUM_LATENT), "value": (call.value, NUM_LATENT), "key_rope": (call.key_rope, NUM_ROPE)}
    for name, (cache, width) in caches.items():
        # A 3-D cache [blocks, block_size, D] goes with every layout, one with an axis of heads not with BSND.
        allowed = ([len(call.key), size, width], [len(call.key), *shape, width])
        call.require(list(cache.shape) in allowed, f"{name}.shape", list(cache.shape), f"it must be one of {allowed}")
    same = call.key.data_ptr() == call.value.data_ptr()
    call.require(same, "value", "another tensor", "absorbed MLA reads keys and values from one latent cache")
    require_dtype(call.operator, "block_table", call.block_table, (torch.int32,))
    require_rank(call.operator, "block_table", call.block_table, 2)
    lens = _lengths(call, len(q_lens))
    call.require(len(call.block_table) == len(q_lens), "len(block_table)", len(call.block_table),
                 f"there are {len(q_lens)} sequences")
    joint = torch.cat((call.key.reshape(-1, size, NUM_LATENT), call.key_rope.reshape(-1, size, NUM_ROPE)), dim=-1)
    contexts = []
    for table, length, num_queries in zip(call.block_table.tolist(), lens, q_lens, strict=True):
        call.require(length >= max(num_queries, 1), "actual_seq_lengths_kv", length,
                     f"the sequence has {num_queries} queries")
        blocks = table[: -(-length // size)]
        inside = len(blocks) * size >= length and all(0 <= block < len(joint) for block in blocks)
        call.require(inside, "block_table", blocks, f"{length} tokens need blocks in 0..{len(joint) - 1}")
        contexts.append(joint[blocks].flatten(0, 1)[:length])
    return contexts


def _lengths(call: Call, num_sequences: int) -> list[int]:
    call.require(call.kv_lens is not None, "actual_seq_lengths_kv", None, "a paged cache needs it")
    lens = [int(length) for length in call.kv_lens or ()]
    call.require(len(lens) == num_sequences and len(lens) <= MAX_SEQUENCES, "len(actual_seq_lengths_kv)", len(lens),
                 f"there are {num_sequences} sequences, {MAX_SEQUENCES} at most")
    return lens


def _lengths_from_cumulative(call: Call, argument: str, ends: Sequence[int] | None, total: int) -> list[int]:
    call.require(ends is not None and len(ends) > 0, argument, ends, f"input_layout {call.layout} needs it")
    listed = [int(end) for end in ends or ()]
    call.require(len(listed) <= MAX_SEQUENCES, f"len({argument})", len(listed), f"it must be <= {MAX_SEQUENCES}")
    lens = [end - start for start, end in zip([0, *listed], listed, strict=False)]
    # A sequence without tokens is not excluded by the documents, nor is its result described.
    call.require(min(lens) >= 1, argument, listed, "it must be cumulative, with at least one token a sequence")
    call.require(listed[-1] == total, argument, listed, f"its last entry must be the number of tokens, {total}")
    return lens


def _split(rows: Tensor, lens: list[int]) -> list[Tensor]:
    return list(rows.split(lens))


# ---- prefill: materialised keys and values, packed sequences


def _prefill(call: Call) -> tuple[Tensor, Tensor]:
    """Output [T, N, V], and log-sum-exp [T, N, 1] where it is asked for."""
    require_one_of(call.operator, "input_layout", call.layout, ("TND", "NTD_TND"))
    require_dtype(call.operator, "query", call.query, (torch.bfloat16,))
    call.require(call.block_table is None, "block_table", "given", "packed sequences are not paged")
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        require_rank(call.operator, name, tensor, 3)
    _require_prefill_widths(call)
    tokens_first = call.layout == "TND"
    query, key = _with_rope(call)
    query, key, value = (part if tokens_first else part.transpose(0, 1) for part in (query, key, call.value))
    call.require(len(query) <= MAX_PREFILL_TOKENS, "T", len(query), f"it must be <= {MAX_PREFILL_TOKENS}")
    heads = {query.shape[1], key.shape[1], value.shape[1], call.num_heads, call.num_kv_heads or call.num_heads}
    call.require(len(heads) == 1, "heads of query, key, value and arguments", sorted(heads), "they must be equal")
    call.require(call.num_heads <= MAX_PREFILL_HEADS, "num_heads", call.num_heads, f"it must be <= {MAX_PREFILL_HEADS}")
    call.require(len(key) == len(value), "value.shape", list(value.shape), f"key is {list(key.shape)}")
    q_lens = _lengths_from_cumulative(call, "actual_seq_lengths", call.q_lens, len(query))
    kv_lens = _lengths_from_cumulative(call, "actual_seq_lengths_kv", call.kv_lens, len(key))
    call.require(len(q_lens) == len(kv_lens), "len(actual_seq_lengths_kv)", len(kv_lens),
                 f"there are {len(q_lens)} sequences")
    require_one_of(call.operator, "sparse_mode", call.sparse_mode, (0, 3))
    causal = call.sparse_mode == 3
    _require_mask(call, causal)
    fits = not causal or all(q <= kv for q, kv in zip(q_lens, kv_lens, strict=True))
    call.require(fits, "actual_seq_lengths", q_lens,
                 f"with sparse_mode 3 no sequence may have more queries than keys: {kv_lens}")
    parts = [_softmax_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), call.scale, causal)
             for q, k, v in zip(_split(query, q_lens), _split(key, kv_lens), _split(value, kv_lens), strict=True)]
    out_NTV, lse_NT = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
    lse = lse_NT.T[..., None].contiguous() if call.wants_lse else poison((0,), torch.float32)
    return out_NTV.transpose(0, 1).to(call.query.dtype).contiguous(), lse


def _require_prefill_widths(call: Call) -> None:
    width, value_width = call.query.shape[2], call.value.shape[2]
    call.require(call.key.shape[2] == width, "D of key", call.key.shape[2], f"query has {width}")
    allowed = {128: (128,)} if call.query_rope is not None else PREFILL_WIDTHS[call.operator]
    call.require(width in allowed, "D of query", width, f"it must be one of {list(allowed)}, or {NUM_LATENT} (paged)")
    require_one_of(call.operator, "D of value", value_width, allowed[width])


def _with_rope(call: Call) -> tuple[Tensor, Tensor]:
    if call.query_rope is None or call.key_rope is None:
        return call.query, call.key
    require_shape(call.operator, "key_rope", call.key_rope, [*call.key.shape[:-1], NUM_ROPE])
    return torch.cat((call.query, call.query_rope), -1), torch.cat((call.key, call.key_rope), -1)
