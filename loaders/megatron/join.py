"""Factors put together from tensor-parallel parts; parts that cannot belong together raise Misfit."""

import torch
from torch import Tensor


class Misfit(Exception):
    """Why the parts of one module do not fit together."""


def row_parallel(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
    """lora_A split on its input, lora_B whole on each process."""
    return _cat(a, 1), _same(b, "lora_B")


def column_parallel(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
    """lora_A whole on each process, lora_B split on its output, gate and up each on its own."""
    return _same(a, "lora_A"), _gate_then_up(b, 0)


def joined_experts(by_tp: list[Tensor], *, is_first: bool, side: str) -> Tensor:
    """[e, r, in] or [e, out, r] of one expert-parallel process; `is_first` for gate and up, not down."""
    if (side == "A") == is_first:
        return _same(by_tp, f"lora_{side}")
    return _cat(by_tp, 2) if side == "A" else _gate_then_up(by_tp, 1)


def same_shapes(tensors: list[Tensor]) -> None:
    """Raise Misfit unless all shapes are equal."""
    if len({tensor.shape for tensor in tensors}) > 1:
        raise Misfit("its parts differ in shape between the processes")


def _gate_then_up(parts: list[Tensor], dim: int) -> Tensor:
    """Each part holds its share of gate and then of up; the whole has all of gate first."""
    same_shapes(parts)
    if parts[0].shape[dim] % 2:
        raise Misfit(f"lora_B of gate and up has an odd width: {list(parts[0].shape)}")
    halves = [part.chunk(2, dim=dim) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim=dim)


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    same_shapes(tensors)
    return torch.cat(tensors, dim=dim)


def _same(tensors: list[Tensor], side: str) -> Tensor:
    if not all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        raise Misfit(f"{side} differs between tensor-parallel processes, which should hold copies")
    return tensors[0]
