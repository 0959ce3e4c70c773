"""Which routed rows go to which experts, and which of those are adapted.

Shape suffixes: T input rows, K choices of a row, M routed rows (sorted by expert), L those of adapted experts, E local
experts, G adapted ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertRows:
    """Index tensors, int64 on the device.

    `token_of_M`: the input row of each routed row. `places_TK`: the routed rows of each input row, M where a choice is
    computed elsewhere or dropped; `has_absent`: whether there are such. `counts_E`: routed rows of each local expert.
    `rows_L`: the routed rows of adapted experts (None: all), `counts_G`: how many of them each adapted expert has,
    `adapted_G`: which of the local experts those are.
    `ids_M`: the place in the run of each routed row, for dropout.
    """

    token_of_M: Tensor
    places_TK: Tensor
    has_absent: bool
    counts_E: Tensor
    rows_L: Tensor | None
    counts_G: Tensor
    ids_M: Tensor | None = None
    adapted_G: Tensor | None = None


def with_whole_groups(rows: ExpertRows, gates_M: Tensor, multiple: int) -> tuple[ExpertRows, Tensor]:
    """Fill each expert's rows up to a multiple; what is added has the gate 0 and no place, so it changes nothing."""
    if multiple == 1:
        return rows, gates_M
    wholes_E = rows.counts_E.add(multiple - 1).div(multiple, rounding_mode="floor").mul(multiple)
    shifts_E = (wholes_E.cumsum(0) - wholes_E) - (rows.counts_E.cumsum(0) - rows.counts_E)
    place_of_M = torch.arange(len(gates_M), device=gates_M.device) + shifts_E.repeat_interleave(rows.counts_E)
    num_rows = int(wholes_E.sum())

    def spread(values_M: Tensor) -> Tensor:
        return values_M.new_zeros(num_rows).index_copy(0, place_of_M, values_M)

    rows_L, counts_G = None, wholes_E
    if rows.rows_L is not None:
        adapted_G = _adapted(rows)
        is_adapted_E = torch.zeros_like(wholes_E, dtype=torch.bool).index_fill_(0, adapted_G, True)
        rows_L, counts_G = is_adapted_E.repeat_interleave(wholes_E).nonzero().squeeze(1), wholes_E[adapted_G]
    filled = ExpertRows(
        token_of_M=spread(rows.token_of_M),
        places_TK=torch.cat((place_of_M, place_of_M.new_full((1,), num_rows)))[rows.places_TK],
        has_absent=rows.has_absent,
        counts_E=wholes_E,
        rows_L=rows_L,
        counts_G=counts_G,
        ids_M=None if rows.ids_M is None else spread(rows.ids_M),
        adapted_G=rows.adapted_G,
    )
    return filled, spread(gates_M)


def rows_of_part(rows: ExpertRows, experts: slice, span: slice) -> tuple[ExpertRows, slice]:
    """The rows of some experts, counted from their first, and which of the adapted experts are among them."""
    if span == slice(0, None):
        return rows, experts if rows.rows_L is None else slice(0, None)
    ids_M = None if rows.ids_M is None else rows.ids_M[span]
    token_of_M, counts_E, rows_L, counts_G = rows.token_of_M[span], rows.counts_E[experts], None, rows.counts_E[experts]
    adapted = experts
    if rows.rows_L is not None:
        low, high = _between(rows.rows_L, span)
        adapted = slice(*_between(_adapted(rows), experts))
        rows_L, counts_G = rows.rows_L[low:high] - span.start, rows.counts_G[adapted]
    return ExpertRows(token_of_M, rows.places_TK, rows.has_absent, counts_E, rows_L, counts_G, ids_M), adapted


def _adapted(rows: ExpertRows) -> Tensor:
    if rows.adapted_G is None:
        raise RuntimeError("rows of some experts need to say which those are")
    return rows.adapted_G


def _between(ascending: Tensor, span: slice) -> tuple[int, int]:
    """The places of an ascending tensor's values that lie in the span."""
    low, high = torch.searchsorted(ascending, ascending.new_tensor([span.start, span.stop])).tolist()
    return low, high
