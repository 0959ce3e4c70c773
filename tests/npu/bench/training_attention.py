"""npu_fusion_attention, the differentiable attention of training, for batches of equal length.

Shape suffixes: B documents, N heads, S queries, L keys, D widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.npu.bench.attention import UNLIMITED, require_compressed_mask
from tests.npu.bench.limits import (
    FLOATS,
    poison,
    refuse_unmodelled,
    require,
    require_dtype,
    require_one_of,
    require_rank,
    require_same_dtype,
    require_shape,
)
from tests.npu.bench.registry import kernel

FUSION = "npu_fusion_attention"
MAX_WIDTH = 768
MAX_HEADS = 256
# The kernel keeps eight copies of each row's maximum and sum.
STATISTICS = 8


def _later(query: Tensor, key: Tensor, mask: Tensor | None, sparse_mode: int) -> Tensor | None:
    """Which scores are masked, [S, L] or broadcast to [B, N, S, L]; None where none is."""
    if sparse_mode == 0:
        return None if mask is None else mask.bool()
    offset = key.shape[2] - query.shape[2] if sparse_mode == 3 else 0
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1 + offset)


def _scores(query: Tensor, key: Tensor, scale: float, later: Tensor | None) -> Tensor:
    scores = torch.einsum("bnsd,bnld->bnsl", query.float(), key.float()) * scale
    return scores if later is None else scores.masked_fill(later, float("-inf"))


def _formula(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: None = None,
    padding_mask: None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED, next_tockens: int = UNLIMITED, inner_precise: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None, sparse_mode: int = 0, **_: object,
) -> Tensor:
    probabilities = _scores(query, key, scale, _later(query, key, atten_mask, sparse_mode)).softmax(-1)
    return (probabilities @ value.float()).to(query.dtype)


@kernel(FUSION, formula=_formula)
def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED, next_tockens: int = UNLIMITED, inner_precise: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None, dropout_mask: Tensor | None = None,
    seed: int = 0, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Output [B, N, S, D]; each row's maximum and sum [B, N, S, 8] float32; nothing; seed, offset, dropout's length."""
    refuse_unmodelled(
        FUSION, pse=pse, padding_mask=padding_mask, prefix=prefix, actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen, sink=sink, dropout_mask=dropout_mask,
    )
    require_one_of(FUSION, "input_layout", input_layout, ("BNSD",))
    require_one_of(FUSION, "keep_prob", keep_prob, (1.0,))
    require_one_of(FUSION, "sparse_mode", sparse_mode, (0, 2, 3))
    require((pre_tockens, next_tockens) == (UNLIMITED, UNLIMITED), FUSION, "pre_tockens, next_tockens",
            (pre_tockens, next_tockens), "they must agree with the mask; modes 2 and 3 ignore them")
    _require_shapes(query, key, value, head_num)
    _require_mask(query, key, atten_mask, sparse_mode)
    scores = _scores(query, key, scale, _later(query, key, atten_mask, sparse_mode))
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    out = ((weights / total) @ value.float()).to(query.dtype)
    copies = (*query.shape[:3], STATISTICS)
    nothing = poison((0,), query.dtype)
    return out, highest.expand(copies).contiguous(), total.expand(copies).contiguous(), nothing, seed, offset, 0


def _require_shapes(query: Tensor, key: Tensor, value: Tensor, head_num: int) -> None:
    require_dtype(FUSION, "query", query, FLOATS)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_same_dtype(FUSION, name, tensor, "query", query)
        require_rank(FUSION, name, tensor, 4)
    # One sentence of the document allows a narrower value, another asks for key and value of one shape.
    require_shape(FUSION, "value", value, key.shape)
    require_shape(FUSION, "key", key, [query.shape[0], key.shape[1], key.shape[2], query.shape[3]])
    require(key.shape[1] == query.shape[1], FUSION, "heads of key", key.shape[1],
            "the bench models as many as query has")
    require(head_num == query.shape[1] <= MAX_HEADS, FUSION, "head_num", head_num,
            f"query has {query.shape[1]}, <= {MAX_HEADS}")
    require(1 <= query.shape[3] <= MAX_WIDTH, FUSION, "D", query.shape[3], f"it must lie in 1..{MAX_WIDTH}")


def _require_mask(query: Tensor, key: Tensor, mask: Tensor | None, sparse_mode: int) -> None:
    if sparse_mode != 0:
        require_compressed_mask(FUSION, mask)
    if mask is None:
        return
    require_dtype(FUSION, "atten_mask", mask, (torch.bool, torch.uint8))
    if sparse_mode == 0:
        size = [query.shape[2], key.shape[2]]
        leading = [list(shape) for shape in ((), (1, 1), (len(query), 1), query.shape[:2])]
        require(list(mask.shape) in [[*lead, *size] for lead in leading], FUSION, "atten_mask.shape", list(mask.shape),
                f"it must be {size}, alone or for each document and head")
        require(not bool(mask.bool().all(-1).any()), FUSION, "atten_mask", "a row of ones", "each query must see a key")
