"""All checks: every operation of the table that computes, at every size that the run has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runtime.doctor.attention_cases import attention_cases
from runtime.doctor.case import Case
from runtime.doctor.dense_cases import dense_cases
from runtime.doctor.expert_cases import expert_cases
from runtime.doctor.routing_cases import routing_cases
from runtime.doctor.shapes import Shapes

# Methods of the table that only say how work is laid out; the products and the training step go by what they say.
LAYOUT = ("shares", "side_by_side", "panel_columns")


@dataclass(frozen=True)
class Check:
    """One case at one size in one dtype."""

    case: Case
    shapes: Shapes
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What the report calls it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.operation} ({self.case.phase}), {self.shapes.name}, {dtype}"


def all_cases() -> list[Case]:
    """One or more for every operation."""
    return [*expert_cases(), *routing_cases(), *dense_cases(), *attention_cases()]


def all_checks(sizes: list[tuple[Shapes, tuple[torch.dtype, ...]]]) -> Iterator[Check]:
    """Every case at every size in its dtypes; a case of fixed dtype comes once."""
    for shapes, dtypes in sizes:
        for case in all_cases():
            if case.full_size_only and (shapes.is_reduced or shapes.num_processes == 1):
                continue
            for dtype in dtypes if case.dtype is None else (case.dtype,):
                yield Check(case, shapes, dtype)
