"""What a layer needs to know of LoRA: one object per step that adds the deltas of the step's adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from runtime.ops.routing import SortedRows


class ExpertDeltas(Protocol):
    """The adapters of one layer's routed rows."""

    def add_gate_up_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """Add gate and up deltas."""
        ...

    def add_down_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """Add down deltas."""
        ...


class StepLora(Protocol):
    """The adapters of one step. Rows of `x` and `y` are the step's tokens unless a method says otherwise."""

    def add_linear_(self, module: str, y_TN: Tensor, x_TK: Tensor) -> None:
        """Add every token's delta for a linear module, by its full name."""
        ...

    def add_linear_of_sequence_(self, module: str, y_LN: Tensor, x_LK: Tensor, sequence: int) -> None:
        """The same for rows that all belong to one sequence of the batch (its cached context, say)."""
        ...

    def add_linear_of_rows_(self, module: str, y_BN: Tensor, x_BK: Tensor, rows_B: Tensor) -> None:
        """The same for a subset of the step's tokens, `rows_B` ascending."""
        ...

    def factors_of_rows(self, module: str, rows: list[int]) -> list[tuple[slice, Tensor, Tensor]]:
        """For each run of `rows` (ascending token indices) with one adapter: the run, A [K, R] and B [R, N]."""
        ...

    def adapts(self, modules: Sequence[str]) -> bool:
        """Whether an adapter of this step changes one of these linear modules, by their full names."""
        ...

    def route_keys(self, experts_TE: Tensor) -> tuple[Tensor, int]:
        """Sort keys [T, E] of routed rows, ascending by expert, then by adapter; and how many an expert has."""
        ...

    def expert_deltas(self, layer: int, keys_TE: Tensor, rows: SortedRows) -> ExpertDeltas:
        """The deltas of one layer's routed rows, which were sorted by their keys."""
        ...
