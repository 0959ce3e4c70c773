"""CPU back-end, for development and small models.

Decoding multiplies one or two rows by each of many expert weights. PyTorch's matmul reaches a small part of memory
bandwidth there; `embedding_bag` with per-sample weights computes the same product (the weighted sum of a weight's
rows), reads each row once and needs no call per group. Larger groups go through matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, pad

from runtime.ops import cpu_threads, reference
from runtime.ops.base import Ops, T
from runtime.ops.cpu_attention import causal_attention
from runtime.ops.cpu_packed_groups import PackedGroups
from runtime.ops.frozen_groups import FrozenGroups, PlainGroups
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.lora_rows import LoraRows
from runtime.ops.routing import SortedRows

# Rows per group up to which embedding_bag beats matmuls, looped or batched (`benchmarks/grouped_products.py`).
MAX_BAG_ROWS_PER_BASE_GROUP = 6
MAX_BAG_ROWS_PER_LORA_PAGE = 16
MAX_PANEL_COLUMNS = 256
# oneDNN compiles and caches a kernel for each number of rows: milliseconds and half a megabyte for each.
ROW_MULTIPLE = 16
ROWS_IN_CACHE = 128
MIN_ROWS_OF_SHARES = 1024
WHOLE_GROUP_ROWS = 8  # in training, where groups are larger and kernels used for hours


class CpuOps(Ops):
    """Grouped products chosen by the number of rows per group."""

    routed_row_multiple = WHOLE_GROUP_ROWS
    core_share = 0.24

    def shares(self, counts_G: Tensor) -> list[tuple[slice, slice]]:
        """See `Ops.shares`: one for each core, once there are many rows."""
        counts = counts_G.tolist()
        if cpu_threads.num_threads() == 1 or sum(counts) < MIN_ROWS_OF_SHARES:
            return super().shares(counts_G)
        return cpu_threads.equal_shares(counts, cpu_threads.num_threads())

    def side_by_side(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """See `Ops.side_by_side`."""
        return cpu_threads.side_by_side(tasks)

    def panel_columns(self, num_columns: int, num_parts: int = 1) -> int:
        """See `Ops.panel_columns`: as many as embedding_bag sums in registers, so that it streams through memory."""
        if num_columns <= MAX_PANEL_COLUMNS:
            return num_columns
        of_part = num_columns // num_parts
        return max(width for width in range(1, MAX_PANEL_COLUMNS + 1) if of_part % width == 0)

    def pack_linear(self, weight_NK: Tensor) -> Tensor:
        """See `Ops.pack_linear`: in oneDNN's blocks; without them a few rows take 1.6 times as long in bfloat16."""
        if not _has_blocks(weight_NK):
            return weight_NK
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), None)
        return packed

    def linear(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        """See `Ops.linear`."""
        if not weight_NK.is_mkldnn:
            return torch.nn.functional.linear(x_TK, weight_NK)
        y_TN: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, None, "none", [], "")
        return y_TN

    def grouped_matmul(self, x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_matmul`."""
        counts = counts_G.tolist()
        num_groups = len(counts) - counts.count(0)
        are_many = x_MK.shape[0] > MAX_BAG_ROWS_PER_BASE_GROUP * num_groups
        if weight_GJKW.shape[1] == 1 and _is_one_call(x_MK, weight_GJKW, counts):
            return grouped_mm(x_MK, weight_GJKW[:, 0], offs=_ends(counts_G))
        if weight_GJKW.shape[1] == 1 and (are_many or not weight_GJKW.is_contiguous()):
            return _single_panel_matmul(x_MK, weight_GJKW[:, 0], counts)
        if are_many:
            return _loop_matmul(x_MK, weight_GJKW, counts)
        return _panel_bag_matmul(x_MK, weight_GJKW, counts_G)

    def grouped_matmul_add_(self, y_MN: Tensor, x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> None:
        """See `Ops.grouped_matmul_add_`."""
        if weight_GJKW.shape[1] != 1:
            super().grouped_matmul_add_(y_MN, x_MK, weight_GJKW, counts_G)
            return
        counts = counts_G.tolist()
        if _is_one_call(x_MK, weight_GJKW, counts):
            y_MN += grouped_mm(x_MK, weight_GJKW[:, 0], offs=_ends(counts_G))
            return
        start = 0
        for group, count in enumerate(counts):
            if count:
                y_MN[start : start + count].addmm_(x_MK[start : start + count], weight_GJKW[group, 0])
                start += count

    def pack_groups(self, weight_GNK: Tensor) -> FrozenGroups:
        """See `Ops.pack_groups`: in bfloat16, where oneDNN has blocks of its own."""
        return PackedGroups.pack(weight_GNK) if _has_blocks(weight_GNK) else PlainGroups(weight_GNK, self)

    def grouped_outer(self, x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_outer`: wide results are faster; of 16 bits, sums are float32's and rounded once."""
        if x_MK.shape[1] > y_MN.shape[1]:
            return self.grouped_outer(y_MN, x_MK, counts_G).transpose(1, 2)
        if _is_one_call(x_MK, y_MN, counts_G.tolist()):
            return grouped_mm(x_MK.T, y_MN, offs=_ends(counts_G)).float()
        x_MK, y_MN = x_MK.float(), y_MN.float()
        outer_GKN = x_MK.new_zeros(len(counts_G), x_MK.shape[1], y_MN.shape[1])
        start = 0
        for group, count in enumerate(counts_G.tolist()):
            if count:
                torch.mm(x_MK[start : start + count].T, y_MN[start : start + count], out=outer_GKN[group])
                start += count
        return outer_GKN

    def lora_add_(self, y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], lora: LoraRows) -> None:
        """See `Ops.lora_add_`."""
        pages_M = lora.pages_M
        rows = (pages_M >= 0).nonzero().squeeze(1)
        if rows.numel() == 0:
            return
        pages, counts = torch.unique_consecutive(pages_M[rows], return_counts=True)
        if rows.numel() <= MAX_BAG_ROWS_PER_LORA_PAGE * pages.numel():
            _bag_lora_add_(y_MN, x_MK, a_PKR, bs_PRN, rows, pages_M[rows])
        else:
            _tile_lora_add_(y_MN, x_MK, a_PKR, bs_PRN, rows, pages, counts)

    def combine_experts(self, y_MN: Tensor, rows: SortedRows, weights_TE: Tensor) -> Tensor:
        """See `Ops.combine_experts`: one expert after the other, which never writes all rows out in float32."""
        places_M = rows.places_M
        sum_TN = y_MN.new_zeros(weights_TE.shape[0], y_MN.shape[1], dtype=torch.float32)
        for places_T, weights_T in zip(places_M.view_as(weights_TE).unbind(1), weights_TE.unbind(1), strict=True):
            sum_TN.addcmul_(y_MN.index_select(0, places_T).float(), weights_T[:, None])
        return sum_TN.to(y_MN.dtype)

    def sum_rows(self, y_MN: Tensor, places_TE: Tensor) -> Tensor:
        """See `Ops.sum_rows`: as bags of rows, which are summed in float32 in one pass."""
        return embedding_bag(places_TE, y_MN, mode="sum") if len(y_MN) else super().sum_rows(y_MN, places_TE)

    def swiglu(self, x_T2N: Tensor) -> Tensor:
        """See `Ops.swiglu`: some rows at a time, so that what passes from step to step stays in the cache."""
        value_TN = x_T2N.new_empty(x_T2N.shape[0], x_T2N.shape[1] // 2)
        for x, out in zip(x_T2N.split(ROWS_IN_CACHE), value_TN.split(ROWS_IN_CACHE), strict=True):
            gate, up = x.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), up, out=out)
        return value_TN

    def swiglu_backward(self, x_T2N: Tensor, grad_TN: Tensor) -> Tensor:
        """See `Ops.swiglu_backward`: some rows at a time, as `swiglu`."""
        grad_T2N = torch.empty_like(x_T2N)
        for x, grad, out in zip(*(t.split(ROWS_IN_CACHE) for t in (x_T2N, grad_TN, grad_T2N)), strict=True):
            gate, up = x.chunk(2, dim=-1)
            out_gate, out_up = out.chunk(2, dim=-1)
            torch.mul(grad, torch.nn.functional.silu(gate), out=out_up)
            out_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grad_T2N

    def attention(self, query_DHLX: Tensor, key_DHLX: Tensor, value_DHLV: Tensor, scale: float) -> Tensor:
        """See `Ops.attention`."""
        query, key, value = (x.flatten(0, 1) for x in (query_DHLX, key_DHLX, value_DHLV))
        return causal_attention(query, key, value, scale).view(*query_DHLX.shape[:3], -1)

    def mla_decode(
        self, query_BHC: Tensor, query_BHD: Tensor, cache: LatentCache, context: DecodeContext, scale: float
    ) -> Tensor:
        """See `Ops.mla_decode`: in float32, whose small products are twice as fast here as those of 16 bits."""
        query_BHX = torch.cat((query_BHC, query_BHD), dim=-1)
        latents_BLX = cache.read_joint(context.slots_BL.flatten()).float().unflatten(0, context.slots_BL.shape)
        lens_B = context.lens_B if context.is_padded else None
        num_latent = query_BHC.shape[2]
        return reference.attend_latents(query_BHX.float(), latents_BLX, lens_B, scale, num_latent).to(query_BHX.dtype)

    def attend_block(
        self,
        query_THN: Tensor,
        query_THD: Tensor,
        key_LHN: Tensor,
        key_LD: Tensor,
        value_LHV: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.attend_block`: PyTorch's flash kernel, which never holds the scores of a whole block."""
        query_HTX, key_HLX = reference.joined_heads(query_THN, query_THD, key_LHN, key_LD)
        num_value = value_LHV.shape[2]
        width = max(query_HTX.shape[2], num_value)
        # The kernel wants one width, and zeros change no product. In 16 bits it loses twice what plain attention does.
        parts = (query_HTX, key_HLX, value_LHV.transpose(0, 1))
        query, key, value = (pad(x.float(), (0, width - x.shape[2]))[None] for x in parts)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse_HT = flash(query, key, value, 0.0, causal, scale=scale)
        return out[0, ..., :num_value].transpose(0, 1), lse_HT[0].T


def _is_one_call(x_MK: Tensor, other: Tensor, counts: list[int]) -> bool:
    """Whether PyTorch's own loop over the groups takes these, which holds no lock that other shares would wait for.

    It takes strides of whole 16 bytes; in 16 bits every number of rows would be another compiled kernel.
    """
    if x_MK.dtype not in (torch.bfloat16, torch.float32) or any(count % WHOLE_GROUP_ROWS for count in counts):
        return False
    widths = (*other.shape[-2:], *x_MK.stride()) if other.dim() > 2 else (*other.stride(), *x_MK.stride())
    return all(width * x_MK.element_size() % 16 == 0 for width in widths if width > 1)


def _ends(counts_G: Tensor) -> Tensor:
    """A group list for grouped_mm."""
    return counts_G.cumsum(0, dtype=torch.int32)


def _has_blocks(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by the weight in a layout of its own."""
    return weight.dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _panel_bag_matmul(x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> Tensor:
    num_panels, _, width = weight_GJKW.shape[1:]
    groups_M = torch.repeat_interleave(counts_G, output_size=x_MK.shape[0])
    panels_MJ = groups_M[:, None] * num_panels + torch.arange(num_panels)
    panels_GKW = weight_GJKW.flatten(0, 1)
    x_of_panels = x_MK.repeat_interleave(num_panels, 0)
    y_MW = _bag_matmul(x_of_panels, panels_GKW, _bag_index(panels_MJ.flatten(), panels_GKW))
    return y_MW.view(len(x_MK), num_panels * width)


def _loop_matmul(x_MK: Tensor, weight_GJKW: Tensor, counts: list[int]) -> Tensor:
    num_panels, _, width = weight_GJKW.shape[1:]
    y_MJW = x_MK.new_empty(x_MK.shape[0], num_panels, width)
    start = 0
    for group, count in enumerate(counts):
        if count:
            rows = _rounded_rows(start, count, x_MK.shape[0])
            product_JMW = torch.bmm(x_MK[rows].expand(num_panels, -1, -1), weight_GJKW[group])
            y_MJW[rows] = product_JMW.transpose(0, 1)
            start += count
    return y_MJW.flatten(1)


def _single_panel_matmul(x_MK: Tensor, weight_GKN: Tensor, counts: list[int]) -> Tensor:
    y_MN = x_MK.new_empty(x_MK.shape[0], weight_GKN.shape[2])
    start = 0
    for group, count in enumerate(counts):
        if count:
            rows = _rounded_rows(start, count, x_MK.shape[0], WHOLE_GROUP_ROWS)
            torch.mm(x_MK[rows], weight_GKN[group], out=y_MN[rows])
            start += count
    return y_MN


def _rounded_rows(start: int, count: int, num_rows: int, multiple: int = ROW_MULTIPLE) -> slice:
    """A group's rows and some of the next group's, which that group then overwrites: few different sizes."""
    return slice(start, min(start + -(-count // multiple) * multiple, num_rows))


def _bag_index(groups_M: Tensor, weight_GKN: Tensor) -> Tensor:
    """For each row the indices [M, K] of its group's K weight rows; 32-bit where they fit, which halves the work."""
    num_groups, num_k = weight_GKN.shape[:2]
    dtype = torch.int32 if num_groups * num_k < 2**31 else torch.int64
    return (groups_M * num_k).to(dtype)[:, None] + torch.arange(num_k, dtype=dtype)


def _bag_matmul(x_MK: Tensor, weight_GKN: Tensor, index_MK: Tensor) -> Tensor:
    """x[m] @ its group's weight for each row, as a bag of the weight's rows with x as the per-sample weights."""
    table = weight_GKN.view(-1, weight_GKN.shape[2])
    return embedding_bag(index_MK, table, per_sample_weights=x_MK.contiguous(), mode="sum")


def _bag_lora_add_(
    y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], rows: Tensor, pages: Tensor
) -> None:
    all_rows = rows.numel() == y_MN.shape[0]
    shrunk_MR = _bag_matmul(x_MK if all_rows else x_MK.index_select(0, rows), a_PKR, _bag_index(pages, a_PKR))
    index_MR = _bag_index(pages, bs_PRN[0])
    num_parts = len(bs_PRN)
    for y_part, shrunk, b_PRN in zip(y_MN.chunk(num_parts, 1), shrunk_MR.chunk(num_parts, 1), bs_PRN, strict=True):
        delta = _bag_matmul(shrunk, b_PRN, index_MR)
        if all_rows:
            y_part += delta
        else:
            y_part.index_add_(0, rows, delta)


def _tile_lora_add_(
    y_MN: Tensor,
    x_MK: Tensor,
    a_PKR: Tensor,
    bs_PRN: Sequence[Tensor],
    rows: Tensor,
    pages: Tensor,
    counts: Tensor,
) -> None:
    """All pages in a few batched products: each page's rows fill tiles of one height, padded with zeros."""
    height = _power_of_two(rows.numel() / pages.numel())
    num_tiles = (counts + height - 1) // height
    tile_pages = torch.repeat_interleave(pages, num_tiles)
    tile_pages = pad(tile_pages, (0, _few_sizes(len(tile_pages)) - len(tile_pages)))
    first_places = (num_tiles.cumsum(0) - num_tiles) * height - (counts.cumsum(0) - counts)
    places = torch.repeat_interleave(first_places, counts) + torch.arange(rows.numel())
    tiles = x_MK.new_zeros(len(tile_pages) * height, x_MK.shape[1])
    tiles[places] = x_MK.index_select(0, rows)
    shrunk = torch.bmm(tiles.view(len(tile_pages), height, -1), a_PKR[tile_pages])
    num_parts = len(bs_PRN)
    for y_part, part, b_PRN in zip(y_MN.chunk(num_parts, 1), shrunk.chunk(num_parts, 2), bs_PRN, strict=True):
        y_part.index_add_(0, rows, torch.bmm(part, b_PRN[tile_pages]).flatten(0, 1)[places])


def _power_of_two(mean_rows: float) -> int:
    """The tile height for a mean number of rows per page: a power of two from 8 to 64."""
    return min(64, max(8, 1 << math.ceil(math.log2(mean_rows))))


def _few_sizes(count: int) -> int:
    """`count` rounded up by at most an eighth, so that few kernels are compiled."""
    step = max(8, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
