"""Experts that an adapter brings in place of the base's (ESFT), in host memory and as the device's grouped weights.

Shape suffixes: N experts of a layer that are replaced, H hidden, I expert width, in panels of W columns as in `moe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loaders.adapter import AdapterTargets
from loaders.adapter_folder import MAX_HEADER_BYTES
from loaders.adapter_types import ExpertShape, ExpertWeights, ReplacementExperts
from loaders.errors import AdapterError
from loaders.replacement_experts import load_replacement_experts
from runtime.models.deepseek.moe import ExpertGroups

if TYPE_CHECKING:
    from runtime.adapters.host_adapter import NewPages

# Files are often float32 where the device holds 16 bits; larger ones cannot fit, so they are not read at all.
MAX_FILE_BYTES_PER_DEVICE_BYTE = 2


@dataclass(frozen=True)
class SpareRoom:
    """What the device sets aside for such experts: how many in each layer, how many bytes, and their panels' columns.

    Plain data, so that files can be read where no device is.
    """

    num_experts: int = 0
    num_bytes: int = 0
    columns13: int = 1
    columns2: int = 1


NO_ROOM = SpareRoom()


@dataclass(frozen=True)
class LayerReplacement:
    """The experts of one layer, ascending, and their weights [N, ...] as they lie on the device."""

    experts: list[int]
    groups: ExpertGroups

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self.groups.w13.nbytes + self.groups.w2.nbytes


def read_replacement(
    path: Path,
    targets: AdapterTargets,
    room: SpareRoom,
    dtype: torch.dtype,
    allocate: NewPages,
    expect: Callable[[int], None] = lambda _: None,
) -> tuple[ReplacementExperts, dict[int, LayerReplacement]]:
    """What an ESFT folder holds, and the same by layer, converted to `dtype`.

    `allocate` gives memory for the weights, and all of it is written; `expect` hears before how many numbers that will
    be. Raises AdapterError with every problem: more
    experts in a layer than there is room for, and weights that are not finite in `dtype`, among them.
    """
    max_bytes = MAX_FILE_BYTES_PER_DEVICE_BYTE * room.num_bytes + MAX_HEADER_BYTES if room.num_experts else None
    weights = load_replacement_experts(path, targets, max_bytes=max_bytes, max_experts_per_layer=room.num_experts)
    expect(sum(3 * len(own) * targets.experts[x].hidden * targets.experts[x].intermediate
               for x, own in weights.experts.items()))  # fmt: skip
    layers = {
        layer: _converted(experts, targets.experts[layer], room, dtype, allocate)
        for layer, experts in sorted(weights.experts.items())
    }
    problems = [
        f"layer {layer}: weights overflow {str(dtype).removeprefix('torch.')}"
        for layer, replacement in layers.items()
        if not _is_finite(replacement.groups)
    ]
    if problems:
        raise AdapterError(f"{path}: ESFT adapter refused, {len(problems)} layers overflow", problems)
    return weights, layers


def _converted(
    experts: Mapping[int, ExpertWeights], shape: ExpertShape, room: SpareRoom, dtype: torch.dtype, allocate: NewPages
) -> LayerReplacement:
    hidden, width, count = shape.hidden, shape.intermediate, len(experts)
    groups = ExpertGroups(
        allocate((count, 2 * width // room.columns13, hidden, room.columns13), dtype),
        allocate((count, hidden // room.columns2, width, room.columns2), dtype),
    )
    ascending = sorted(experts)
    for group, expert in enumerate(ascending):
        for kind, destination in groups.destinations(group).items():
            stored: torch.Tensor = getattr(experts[expert], kind)
            destination.copy_(stored.view(destination.shape))
    return LayerReplacement(ascending, groups)


def _is_finite(groups: ExpertGroups) -> bool:
    ends = (end for weight in (groups.w13, groups.w2) for end in torch.aminmax(weight))
    return all(math.isfinite(float(end)) for end in ends)
