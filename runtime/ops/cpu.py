"""CPU back-end, for development and small models.

Decoding multiplies one or two rows by each of many expert weights. PyTorch's matmul reaches a small part of memory
bandwidth there; `embedding_bag` with per-sample weights computes the same product (the weighted sum of a weight's
rows), reads each row once and needs no call per group. Larger groups go through matmul.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from runtime.ops.base import Ops

# Rows per group up to which embedding_bag beats a loop of matmuls (benchmarks/cpu_grouped_matmul.py).
MAX_BAG_ROWS_PER_BASE_GROUP = 3
MAX_BAG_ROWS_PER_LORA_PAGE = 8
# oneDNN compiles and caches a kernel for each number of rows: milliseconds and half a megabyte for each.
ROW_MULTIPLE = 16


class CpuOps(Ops):
    """Grouped products chosen by the number of rows per group."""

    def grouped_matmul(self, x_MK: Tensor, weight_GKN: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_matmul`."""
        counts = counts_G.tolist()
        num_groups = len(counts) - counts.count(0)
        if x_MK.shape[0] <= MAX_BAG_ROWS_PER_BASE_GROUP * num_groups:
            groups_M = torch.repeat_interleave(counts_G, output_size=x_MK.shape[0])
            return _bag_matmul(x_MK, weight_GKN, groups_M)
        y_MN = x_MK.new_empty(x_MK.shape[0], weight_GKN.shape[2])
        start = 0
        for group, count in enumerate(counts):
            if count:
                rows = _rounded_rows(start, count, x_MK.shape[0])
                torch.mm(x_MK[rows], weight_GKN[group], out=y_MN[rows])
                start += count
        return y_MN

    def lora_add_(self, y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], pages_M: Tensor) -> None:
        """See `Ops.lora_add_`."""
        rows = (pages_M >= 0).nonzero().squeeze(1)
        if rows.numel() == 0:
            return
        pages, counts = torch.unique_consecutive(pages_M[rows], return_counts=True)
        if rows.numel() <= MAX_BAG_ROWS_PER_LORA_PAGE * pages.numel():
            _bag_lora_add_(y_MN, x_MK, a_PKR, bs_PRN, rows, pages_M[rows])
        else:
            _loop_lora_add_(y_MN, x_MK, a_PKR, bs_PRN, rows, pages.tolist(), counts.tolist())

    def attend_block(
        self, query_HTX: Tensor, key_HLX: Tensor, value_HLV: Tensor, scale: float, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.attend_block`: PyTorch's flash kernel, which never holds the scores of a whole block."""
        num_value = value_HLV.shape[2]
        width = max(query_HTX.shape[2], num_value)
        # The kernel wants queries, keys and values of one width; zeros change no product.
        query, key, value = (pad(x, (0, width - x.shape[2]))[None] for x in (query_HTX, key_HLX, value_HLV))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse_HT = flash(query, key, value, 0.0, causal, scale=scale)
        return out[0, ..., :num_value].float(), lse_HT[0]


def _rounded_rows(start: int, count: int, num_rows: int) -> slice:
    """A group's rows and some of the next group's, which that group then overwrites: few different sizes."""
    return slice(start, min(start + -(-count // ROW_MULTIPLE) * ROW_MULTIPLE, num_rows))


def _bag_matmul(x_MK: Tensor, weight_GKN: Tensor, groups_M: Tensor) -> Tensor:
    """x[m] @ weight[groups[m]] for each row, as a bag of the weight's K rows with x as the per-sample weights."""
    num_k, num_n = weight_GKN.shape[1:]
    index_MK = groups_M[:, None] * num_k + torch.arange(num_k)
    return embedding_bag(index_MK, weight_GKN.view(-1, num_n), per_sample_weights=x_MK.contiguous(), mode="sum")


def _bag_lora_add_(
    y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], rows: Tensor, pages: Tensor
) -> None:
    all_rows = rows.numel() == y_MN.shape[0]
    shrunk_MR = _bag_matmul(x_MK if all_rows else x_MK[rows], a_PKR, pages)
    deltas = [
        _bag_matmul(part_MR, b_PRN, pages)
        for part_MR, b_PRN in zip(shrunk_MR.chunk(len(bs_PRN), dim=1), bs_PRN, strict=True)
    ]
    delta_MN = deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=1)
    if all_rows:
        y_MN += delta_MN
    else:
        y_MN.index_add_(0, rows, delta_MN)


def _loop_lora_add_(
    y_MN: Tensor,
    x_MK: Tensor,
    a_PKR: Tensor,
    bs_PRN: Sequence[Tensor],
    rows: Tensor,
    pages: list[int],
    counts: list[int],
) -> None:
    x_rows = x_MK[rows]
    delta_MN = y_MN.new_empty(rows.numel(), y_MN.shape[1])
    start = 0
    for page, count in zip(pages, counts, strict=True):
        run = _rounded_rows(start, count, len(rows))
        parts = torch.mm(x_rows[run], a_PKR[page]).chunk(len(bs_PRN), dim=1)
        for part, b_PRN, out in zip(parts, bs_PRN, delta_MN[run].chunk(len(bs_PRN), dim=1), strict=True):
            torch.mm(part, b_PRN[page], out=out)
        start += count
    y_MN.index_add_(0, rows, delta_MN)
