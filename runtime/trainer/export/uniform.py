"""One rank and one scale for a whole adapter: readers such as vLLM know a single alpha / r for a file.

Lower ranks are padded with zeros, and where a module has another scale, its B takes the ratio. Both are exact but for
the rounding of B, which a ratio that is a power of two does not have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.adapter_types import LoraPair


@dataclass(frozen=True)
class Uniform:
    """The rank r and scale alpha / r that every module of the file gets."""

    lora_rank: int
    scale: float

    @property
    def alpha(self) -> float:
        """lora_alpha of adapter_config.json."""
        return self.scale * self.lora_rank


def uniform_of(pairs: Iterable[tuple[str, LoraPair]]) -> Uniform:
    """The largest rank, and the scale that most numbers of B have; raises ValueError for a scale that is not positive.

    `pairs` are (module name, factors), at least one.
    """
    lora_rank = 1
    weight_of_scale: Counter[float] = Counter()
    for name, pair in pairs:
        if not 0 < pair.scale < math.inf:
            raise ValueError(f"{name}: scale {pair.scale!r} cannot be written, it must be above 0 (check its alpha)")
        lora_rank = max(lora_rank, pair.lora_rank)
        weight_of_scale[pair.scale] += pair.b.numel()
    scale, _ = max(weight_of_scale.items(), key=lambda item: (item[1], -item[0]))
    return Uniform(lora_rank, scale)


def a_of(pair: LoraPair, uniform: Uniform, dtype: torch.dtype) -> Tensor:
    """A [r, in] in `dtype`, zero rows added up to the common rank."""
    return torch.nn.functional.pad(pair.a, (0, 0, 0, uniform.lora_rank - pair.lora_rank)).to(dtype)


def b_of(pair: LoraPair, uniform: Uniform, dtype: torch.dtype) -> Tensor:
    """B [out, r] in `dtype`, zero columns added, times scale / common scale (taken in float32, rounded once)."""
    b = torch.nn.functional.pad(pair.b, (0, uniform.lora_rank - pair.lora_rank))
    if pair.scale != uniform.scale:
        b = b.float() * (pair.scale / uniform.scale)
    return b.to(dtype)
