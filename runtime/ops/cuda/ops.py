"""CUDA back-end: PyTorch's grouped matmul, with group lists that never leave the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.ops.base import Ops
from runtime.ops.lora_rows import LoraRows


class CudaOps(Ops):
    """Everything in one grouped product per call; group lists stay on the device."""

    lora_rank_multiple = 8  # strides must be multiples of 16 bytes
    max_copy_bytes = 128 * 2**20
    max_block_numbers = 2**27  # half a gigabyte of float32 scores

    def grouped_matmul(self, x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_matmul`."""
        return _grouped_mm(x_MK, weight_GJKW.squeeze(1), counts_G)

    def grouped_outer(self, x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
        """See `Ops.grouped_outer`."""
        offsets = counts_G.cumsum(0).to(torch.int32)
        outer_GKN = torch.nn.functional.grouped_mm(x_MK.T, y_MN, offs=offsets).float()
        return outer_GKN.masked_fill_((counts_G == 0)[:, None, None], 0)

    def attention(self, query_DHLX: Tensor, key_DHLX: Tensor, value_DHLV: Tensor, scale: float) -> Tensor:
        """See `Ops.attention`."""
        flash = torch.nn.functional.scaled_dot_product_attention
        return flash(query_DHLX, key_DHLX, value_DHLV, is_causal=True, scale=scale)

    def lora_add_(self, y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], lora: LoraRows) -> None:
        """See `Ops.lora_add_`. Rows without a page are multiplied with a neighbour's and then add zeros."""
        if not lora.num_pages or not x_MK.shape[0]:
            return
        ends_P = lora.ends_P.to(torch.int32)
        shrunk_MR = torch.nn.functional.grouped_mm(x_MK, a_PKR, offs=ends_P)
        if lora.without_page_M1 is not None:
            # Replaced, not multiplied by zero: the product with a neighbour's factors may have overflown.
            shrunk_MR.masked_fill_(lora.without_page_M1, 0)
        parts = zip(y_MN.chunk(len(bs_PRN), dim=1), shrunk_MR.chunk(len(bs_PRN), dim=1), bs_PRN, strict=True)
        for y_part, part_MR, b_PRN in parts:
            y_part += torch.nn.functional.grouped_mm(part_MR.contiguous(), b_PRN, offs=ends_P)


def _grouped_mm(x_MK: Tensor, weight_GKN: Tensor, counts_G: Tensor) -> Tensor:
    """Rows beyond the sum of the counts are uninitialised in the result."""
    return torch.nn.functional.grouped_mm(x_MK, weight_GKN, offs=counts_G.cumsum(0).to(torch.int32))
