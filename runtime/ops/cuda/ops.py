"""CUDA back-end: PyTorch's grouped matmul, with group lists that never leave the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.ops.base import Ops


class CudaOps(Ops):
    """Everything in one grouped product per call; group lists stay on the device."""

    lora_rank_multiple = 8  # strides must be multiples of 16 bytes

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

    def lora_add_(self, y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], pages_M: Tensor) -> None:
        """See `Ops.lora_add_`. Rows without a page are moved past the end of the group list and masked."""
        num_pages = a_PKR.shape[0]
        has_page = pages_M >= 0
        order = torch.where(has_page, pages_M, num_pages).argsort(stable=True)
        counts_P = torch.zeros(num_pages, dtype=torch.int64, device=y_MN.device)
        counts_P.index_add_(0, pages_M.clamp(min=0), has_page.long())
        shrunk_MR = _grouped_mm(x_MK[order], a_PKR, counts_P)
        deltas = [
            _grouped_mm(part_MR.contiguous(), b_PRN, counts_P)
            for part_MR, b_PRN in zip(shrunk_MR.chunk(len(bs_PRN), dim=1), bs_PRN, strict=True)
        ]
        # Rows past the last group hold whatever was in memory, so they are replaced, not multiplied by zero.
        delta_MN = torch.where(has_page[order][:, None], torch.cat(deltas, dim=1), 0)
        y_MN.index_add_(0, order, delta_MN)


def _grouped_mm(x_MK: Tensor, weight_GKN: Tensor, counts_G: Tensor) -> Tensor:
    """Rows beyond the sum of the counts are uninitialised in the result."""
    return torch.nn.functional.grouped_mm(x_MK, weight_GKN, offs=counts_G.cumsum(0).to(torch.int32))
