"""Frozen grouped weights in oneDNN's blocks, once for each direction: it packs plain ones anew at every product.

At the 64 rows that an expert has in a short sequence, that packing is a sixth of the product's time.
Shape suffixes: M rows in order of their group, G groups, K input and N output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_product = torch.ops.mkldnn._linear_pointwise.default
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
    """One call a group and few others: threads that compute other groups wait for each other's Python."""
    parts = zip(x_MK.split(counts_G.tolist()), packed_G, strict=True)
    products = [_product(x_LK, packed, None, "none", [], "") for x_LK, packed in parts if len(x_LK)]
    return torch.cat(products, out=y_MN) if products else y_MN
