"""Deltas of adapters whose outer factors are one for all experts of a layer: A of gate and up, and B of down.

A13 is multiplied with each token once, before its rows go to the experts, and B2 once with the weighted sum of what
the token's experts give: both at the LoRA rank, so that neither is stored or multiplied once for each expert.

Shape suffixes: T tokens, M routed rows, H hidden, I expert width, R LoRA rank, P pages, K and N sides, E choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.adapters.page_pool import PagePool
from runtime.ops.base import Ops
from runtime.ops.lora_rows import LoraRows
from runtime.ops.routing import SortedRows


@dataclass
class SharedOuterDeltas:
    """One layer and rank: `outer` has one page for each adapter, rows `tokens`; `inner` one for each expert of it."""

    ops: Ops
    outer: PagePool
    tokens: LoraRows
    inner: PagePool
    routed: LoraRows
    x_TH: Tensor
    rows: SortedRows
    _shrunk_MR: Tensor | None = field(default=None, init=False)

    def add_gate_up_(self, y_MN: Tensor) -> None:
        """See ExpertDeltas."""
        shrunk_TR = paged_matmul(self.ops, self.x_TH, self.outer.factor("a13"), self.tokens)
        num_choices = len(y_MN) // max(1, len(shrunk_TR))
        shrunk_MR = shrunk_TR.index_select(0, self.rows.order_M.long() // max(1, num_choices))
        for y, shrunk, name in zip(y_MN.chunk(2, 1), shrunk_MR.chunk(2, 1), ("b_gate", "b_up"), strict=True):
            y += paged_matmul(self.ops, shrunk.contiguous(), self.inner.factor(name), self.routed)

    def shrink_down(self, x_MI: Tensor) -> None:
        """Keep the inner products of down for `add_combined_`."""
        self._shrunk_MR = paged_matmul(self.ops, x_MI, self.inner.factor("a2"), self.routed)

    def add_combined_(self, y_TH: Tensor, weights_TE: Tensor) -> None:
        """See ExpertDeltas."""
        if self._shrunk_MR is None:
            raise ValueError("shrink_down comes before add_combined_")
        shrunk_TR = self.ops.combine_experts(self._shrunk_MR, self.rows, weights_TE)
        y_TH += paged_matmul(self.ops, shrunk_TR, self.outer.factor("b2"), self.tokens)


def paged_matmul(ops: Ops, x_MK: Tensor, weight_PKN: Tensor, rows: LoraRows) -> Tensor:
    """Each row times its page's weight, [M, N]; zeros for rows without a page. Weights are finite."""
    counts_P = torch.diff(rows.ends_P, prepend=rows.ends_P.new_zeros(1))
    narrows = weight_PKN.shape[2] < weight_PKN.shape[1]
    # Replaced on the narrower side, and not multiplied by zero: a product with another's page may overflow.
    if rows.without_page_M1 is not None and not narrows:
        x_MK = x_MK.masked_fill(rows.without_page_M1, 0)
    y_MN = ops.grouped_matmul(x_MK, weight_PKN[:, None], counts_P)
    if rows.without_page_M1 is not None and narrows:
        y_MN.masked_fill_(rows.without_page_M1, 0)
    return y_MN
