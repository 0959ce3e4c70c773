"""Frozen grouped weights that training multiplies by in both directions.

Shape suffixes: M rows in order of their group, G groups, K input and N output width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from runtime.ops.base import Ops


class FrozenGroups(Protocol):
    """Weights [G, N, K]; the two products have no gradient of their own and go to `out` if it is given."""

    def forward(self, x_MK: Tensor, counts_G: Tensor, out: Tensor | None = None) -> Tensor:
        """Each row times its group's W^T: [M, N]."""
        ...

    def backward(self, grad_MN: Tensor, counts_G: Tensor, out: Tensor | None = None) -> Tensor:
        """Each row times its group's W: [M, K], the gradient of x for that of the value."""
        ...

    def __getitem__(self, groups: slice) -> FrozenGroups:
        """Some of the groups, without a copy."""
        ...


class PlainGroups:
    """As on disk, multiplied by through the table's grouped product."""

    def __init__(self, weight_GNK: Tensor, ops: Ops) -> None:
        self.weight_GNK = weight_GNK
        self._ops = ops

    def forward(self, x_MK: Tensor, counts_G: Tensor, out: Tensor | None = None) -> Tensor:
        """See FrozenGroups."""
        return _placed(self._ops.grouped_matmul(x_MK, self.weight_GNK.transpose(1, 2)[:, None], counts_G), out)

    def backward(self, grad_MN: Tensor, counts_G: Tensor, out: Tensor | None = None) -> Tensor:
        """See FrozenGroups."""
        return _placed(self._ops.grouped_matmul(grad_MN, self.weight_GNK[:, None], counts_G), out)

    def __getitem__(self, groups: slice) -> PlainGroups:
        """See FrozenGroups."""
        return PlainGroups(self.weight_GNK[groups], self._ops)


def _placed(product: Tensor, out: Tensor | None) -> Tensor:
    return product if out is None else out.copy_(product)
