"""Frozen grouped weights in oneDNN's blocks, once for each direction: it packs plain ones anew at every product.

At the 64 rows that an expert has in a short sequence, that packing is a sixth of the product's time.
Shape suffixes: M rows in order of their group, G groups, K input and N output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW_MULTIPLE = 4  # oneDNN compiles a kernel for each number of rows
LIKELY_ROWS = 64  # the blocks are chosen for so many rows and serve any number


class PackedGroups:
    """Implements FrozenGroups for bfloat16; takes twice the memory of the plain weights, which it does not keep."""

    def __init__(self, forward_G: Sequence[Tensor], backward_G: Sequence[Tensor], widths: tuple[int, int]) -> None:
        """`widths`: (K, N)."""
        self._forward_G, self._backward_G, self._widths = forward_G, backward_G, widths

    @classmethod
    def pack(cls, weight_GNK: Tensor) -> PackedGroups:
        """Copies of [G, N, K] for both directions."""
        num_n, num_k = weight_GNK.shape[1:]
        backward_G = [_packed(weight_NK.T.contiguous()) for weight_NK in weight_GNK]
        return cls([_packed(weight_NK) for weight_NK in weight_GNK], backward_G, (num_k, num_n))

    def forward(self, x_MK: Tensor, counts_G: Tensor, out: Tensor | None = None) -> Tensor:
        """See FrozenGroups."""
        y_MN = x_MK.new_empty(x_MK.shape[0], self._widths[1]) if out is None else out
        return _write_products(y_MN, x_MK, self._forward_G, counts_G)

    def backward(self, grad_MN: Tensor, counts_G: Tensor, out: Tensor | None = None) -> Tensor:
        """See FrozenGroups."""
        grad_MK = grad_MN.new_empty(grad_MN.shape[0], self._widths[0]) if out is None else out
        return _write_products(grad_MK, grad_MN, self._backward_G, counts_G)

    def __getitem__(self, groups: slice) -> PackedGroups:
        """See FrozenGroups."""
        return PackedGroups(self._forward_G[groups], self._backward_G[groups], self._widths)


def _packed(weight_NK: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), LIKELY_ROWS)
    return packed


def _write_products(y_MN: Tensor, x_MK: Tensor, packed_G: Sequence[Tensor], counts_G: Tensor) -> Tensor:
    """A group takes some of the next one's rows along, which that group then overwrites: few different sizes."""
    start = 0
    for packed, count in zip(packed_G, counts_G.tolist(), strict=True):
        if count:
            rows = slice(start, start + -(-count // ROW_MULTIPLE) * ROW_MULTIPLE)
            y_MN[rows] = torch.ops.mkldnn._linear_pointwise(x_MK[rows], packed, None, "none", [], "")
            start += count
    return y_MN
