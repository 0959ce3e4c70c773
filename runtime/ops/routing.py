"""How tokens choose experts, and the choices' rows in the order in which grouped products take them.

Shape suffixes: T tokens, E experts, K choices of a token, M = T x K routed rows, H hidden, G keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingRule:
    """The choice of `num_chosen` experts by score, within the best `num_kept_groups` of `num_groups` equal groups.

    A group counts as its best expert or as the sum of its best two; `masked` is what the experts of other groups count
    as. The weights are the scores of the chosen, divided by their sum if `renormalise`, times `scale`.
    """

    num_chosen: int
    num_groups: int = 1
    num_kept_groups: int = 1
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    group_score: Literal["best", "best two"] = "best two"
    masked: float = float("-inf")
    renormalise: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class SortedRows:
    """The rows of all choices, sorted by key and, within a key, by token; `counts_G` (int64): the rows of each key.

    Choice c = t x K + k. A back-end gives `from_M`, the choice that each sorted row belongs to, or `to_M`, the sorted
    row of each choice; either follows from the other.
    """

    x_MH: Tensor
    counts_G: Tensor
    from_M: Tensor | None = None
    to_M: Tensor | None = None

    @cached_property
    def order_M(self) -> Tensor:
        """The choice that each sorted row belongs to, int64."""
        return _inverse(self.to_M) if self.from_M is None else self.from_M

    @cached_property
    def ends_G(self) -> Tensor:
        """The row after each key's last one, int64."""
        return self.counts_G.cumsum(0)

    @cached_property
    def places_M(self) -> Tensor:
        """The sorted row of each choice."""
        return _inverse(self.from_M) if self.to_M is None else self.to_M


def _inverse(permutation_M: Tensor | None) -> Tensor:
    if permutation_M is None:
        raise ValueError("sorted rows need the choices' places or the rows' choices")
    index_M = permutation_M.long()
    inverse_M = torch.empty_like(index_M)
    inverse_M[index_M] = torch.arange(index_M.numel(), device=index_M.device)
    return inverse_M
