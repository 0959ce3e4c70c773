"""What one check is: an operation of the table at one size, what it is compared with, and what one call costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.doctor.shapes import Shapes
from runtime.ops.base import Ops

Results = tuple[Tensor, ...]
Exact = Callable[[Tensor], Tensor]

# Largest difference from the float32 reference, relative to its largest number.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Prepared:
    """A case with its tensors in place.

    `run` gives the operation's results, `reference` the same in float32 of what it maps to float32 (`Exact`).
    `timed` is what is timed where `run` does more than the operation. `moved_bytes` and `flops` count one call as if
    everything were read and written once. `workspace_bytes`: the most that the reference holds beside its inputs.
    `is_copy`: the results must be equal bit for bit.
    """

    detail: str
    run: Callable[[], Results]
    reference: Callable[[Exact], Results]
    moved_bytes: int
    flops: int = 0
    workspace_bytes: int = 0
    timed: Callable[[], object] | None = None
    is_copy: bool = False


class Source:
    """Makes a case's tensors and counts their bytes; on the device `meta` it only counts.

    `num_bytes` includes the float32 copies that the reference works on.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.host = torch.Generator().manual_seed(seed)
        self.num_bytes = 0
        torch.manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, parts: int = 1) -> Tensor:
        """Normal numbers made on the device; the reference converts them in so many parts."""
        tensor = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        if scale != 1:
            tensor.mul_(scale)
        self.count(tensor, parts)
        return tensor

    def host_normal(self, *shape: int) -> Tensor:
        """Float32 numbers that are the same on every device."""
        return self.place(torch.randn(shape, generator=self.host))

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor that was made on the host."""
        placed = tensor.to(self.device)
        self.count(placed)
        return placed

    def count(self, tensor: Tensor, parts: int = 1) -> None:
        """Count a tensor that lies on the device, and its float32 copy."""
        self.num_bytes += num_bytes(tensor) + 4 * tensor.numel() // parts

    def spread(self, num_rows: int, num_groups: int) -> list[int]:
        """Row counts of groups as uneven as a router's, one of them zero where there are several."""
        shares = torch.rand(num_groups, generator=self.host) + 0.2
        if num_groups > 1:
            shares[num_groups // 2] = 0
        groups = torch.multinomial(shares, num_rows, replacement=True, generator=self.host)
        counts: list[int] = torch.bincount(groups, minlength=num_groups).tolist()
        return counts


Build = Callable[[Shapes, Ops, Source], Prepared]


@dataclass(frozen=True)
class Case:
    """One operation in one phase; `also` names operations that it takes along. `dtype` None: that of the run."""

    operation: str
    phase: str
    build: Build
    also: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    full_size_only: bool = False


def num_bytes(*tensors: Tensor) -> int:
    """Bytes of the tensors' numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def described(*named: tuple[str, Sequence[int]]) -> str:
    """Names and shapes for the report."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in named)
