"""All checks: every operation of the table that computes, at every size that the run has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runtime.doctor.attention_cases import attention_cases
from runtime.doctor.case import Case
from runtime.doctor.dense_cases import dense_cases
from runtime.doctor.expert_cases import expert_cases
from runtime.doctor.mla_cases import mla_cases
from runtime.doctor.routing_cases import routing_cases
from runtime.doctor.shapes import DEEPSEEK_V3, Shapes, demo_shapes
from runtime.ops.base import Ops

# Methods of the table that only say how work is laid out; the products and the training step go by what they say.
LAYOUT = ("shares", "side_by_side", "panel_columns")
SCALES = ("small", "normal", "full")
SMALL_DTYPES, LARGE_DTYPES = (torch.bfloat16, torch.float32), (torch.bfloat16,)


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


def operations() -> list[str]:
    """Every method of the table that computes."""
    methods = (name for name, method in vars(Ops).items() if not name.startswith("_") and callable(method))
    return [name for name in methods if name not in LAYOUT]


def all_cases() -> list[Case]:
    """One or more for every operation."""
    return [*expert_cases(), *routing_cases(), *dense_cases(), *attention_cases(), *mla_cases()]


def all_checks(device: torch.device, scale: str) -> list[Check]:
    """What a run does. `small`: the demo's sizes; `normal`: DeepSeek-V3's too, reduced on a CPU; `full`: all."""
    sizes: list[tuple[Shapes, tuple[torch.dtype, ...]]] = [(demo_shapes(), SMALL_DTYPES)]
    if scale != "small":
        is_reduced = device.type == "cpu" and scale != "full"
        sizes.append((DEEPSEEK_V3.reduced() if is_reduced else DEEPSEEK_V3, LARGE_DTYPES))
    return [check for shapes, dtypes in sizes for check in checks_at(shapes, dtypes)]


def checks_at(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Check]:
    """Every case at one size in some dtypes; a case of a fixed dtype comes once."""
    for case in all_cases():
        if case.full_size_only and (shapes.is_reduced or shapes.num_processes == 1):
            continue
        for dtype in dtypes if case.dtype is None else (case.dtype,):
            yield Check(case, shapes, dtype)
