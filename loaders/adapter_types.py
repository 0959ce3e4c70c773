"""The plain data of adapters: what a base offers, and what an adapter file turns into."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ExpertShape:
    """Routed experts of one layer: gate and up are [intermediate, hidden], down is [hidden, intermediate]."""

    num_experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class AdapterTargets:
    """What a base offers to adapters: linear modules as (out, in) by disk name, and experts by layer index."""

    linears: Mapping[str, tuple[int, int]]
    experts: Mapping[int, ExpertShape]
    num_hidden_layers: int


@dataclass(frozen=True)
class LoraPair:
    """delta W = scale * b @ a, with a [r, in] and b [out, r] in their stored dtype; the scale is not folded in."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def lora_rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]


@dataclass(frozen=True)
class ExpertLora:
    """The factors of one routed expert; None where a projection is not adapted."""

    gate: LoraPair | None = None
    up: LoraPair | None = None
    down: LoraPair | None = None


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter in the form the runtime uses; experts it does not change are not in `experts`.

    `num_bytes` counts the factors kept (a factor shared by gate and up once); `skipped` holds (key, reason).
    """

    linears: Mapping[str, LoraPair]
    experts: Mapping[int, Mapping[int, ExpertLora]]
    digest: str
    config: Mapping[str, Any]
    layout: str
    skipped: tuple[tuple[str, str], ...]
    num_bytes: int
    warnings: tuple[str, ...]
