"""What every adapter layout implements, and the place where the converted factors are collected."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from loaders.adapter_config import AdapterRules
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import AdapterTargets, ExpertLora, LoraPair

Projection = Literal["gate", "up", "down"]


@dataclass
class FormatContext:
    """What a layout may look at: the base, the rules of adapter_config.json, and the limits; it adds problems."""

    targets: AdapterTargets
    rules: AdapterRules
    max_lora_rank: int
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rank_differences: list[str] = field(default_factory=list)

    def check_rank(self, module: str, name: str, lora_rank: int, max_lora_rank: int | None = None) -> None:
        """Add a problem if the rank is above the limit or not the one that rank_pattern states for `name`."""
        limit = self.max_lora_rank if max_lora_rank is None else max_lora_rank
        if lora_rank > limit:
            self.problems.append(f"{module}: rank {lora_rank} is above the allowed {self.max_lora_rank}")
        problem = self.rules.rank_problem(name, lora_rank)
        if problem:
            self.problems.append(problem)
        elif self.rules.rank_differs(name, lora_rank):
            self.rank_differences.append(f"{module} (rank {lora_rank})")


@dataclass
class AdapterBuilder:
    """Collects converted factors; experts get an entry only when one of their projections is adapted."""

    linears: dict[str, LoraPair] = field(default_factory=dict)
    experts: dict[int, dict[int, ExpertLora]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add_expert(self, layer: int, expert: int, projection: Projection, pair: LoraPair) -> None:
        """Set one projection of one expert."""
        experts = self.experts.setdefault(layer, {})
        known = experts.get(expert, ExpertLora())
        if projection == "gate":
            experts[expert] = replace(known, gate=pair)
        elif projection == "up":
            experts[expert] = replace(known, up=pair)
        else:
            experts[expert] = replace(known, down=pair)


class AdapterFormat(Protocol):
    """One layout of adapter files."""

    layout: str

    def recognises(self, module: str) -> bool:
        """Whether the plain module name belongs to this layout."""
        ...

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """Compare all pairs of this layout with the base, from headers only; add every problem to the context."""
        ...

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """Take the pair's tensors out of `tensors` (key -> tensor, as stored) and add what they mean to `builder`."""
        ...


def take(pair: FactorPair, tensors: MutableMapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Remove and return (lora_A, lora_B) as stored, so that memory is freed once they are converted."""
    return tensors.pop(pair.a.stored.name), tensors.pop(pair.b.stored.name)
