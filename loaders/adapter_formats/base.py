"""What every adapter layout implements, and the place where the converted factors are collected."""

from collections.abc import MutableMapping, Set
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from loaders.adapter_config import AdapterRules
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import AdapterTargets, ExpertLora, LoraPair

Projection = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class StackOrder:
    """How a writer lays out flat stacks of experts.

    `is_swapped`: lora_A has the width of the output. `is_expert_major`: in lora_B's columns the expert is outer.
    """

    is_swapped: bool
    is_expert_major: bool


@dataclass
class FormatContext:
    """What a layout may look at: the base, the rules of adapter_config.json, and the limits; it adds problems.

    `writer` is the user's own word for what wrote the file, `is_unsloth_card` whether its README is tagged Unsloth's,
    `b_order_note` the order of lora_B's columns by the file's metadata, `zeros` the keys of tensors that are all zero.
    """

    targets: AdapterTargets
    rules: AdapterRules
    max_lora_rank: int
    writer: str | None = None
    is_unsloth_card: bool = False
    b_order_note: str | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    rank_differences: list[str] = field(default_factory=list)
    stack_order: StackOrder | None = None
    zeros: Set[str] = frozenset()

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

    def check_split(self, module: str, lora_rank: int) -> None:
        """Add a problem if the rank of gate and of up, known once B is read, is above the limit."""
        if lora_rank > self.max_lora_rank:
            self.problems.append(f"{module}: rank {lora_rank} is above the allowed {self.max_lora_rank}")


@dataclass
class AdapterBuilder:
    """Collects converted factors; experts get an entry only when one of their projections is adapted."""

    linears: dict[str, LoraPair] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _experts: dict[int, dict[int, dict[Projection, LoraPair]]] = field(default_factory=dict)
    _shared: dict[tuple[int, Projection], Tensor] = field(default_factory=dict)

    def shared_factor(self, layer: int, projection: Projection, factor: Tensor) -> Tensor:
        """The one tensor object for a factor that all experts of a layer share."""
        return self._shared.setdefault((layer, projection), factor)

    def add_expert(self, layer: int, expert: int, projection: Projection, pair: LoraPair) -> None:
        """Set one projection of one expert."""
        self._experts.setdefault(layer, {}).setdefault(expert, {})[projection] = pair

    def experts(self) -> dict[int, dict[int, ExpertLora]]:
        """The experts of each layer, both ascending."""
        return {
            layer: {expert: ExpertLora(**pairs) for expert, pairs in sorted(own.items())}
            for layer, own in sorted(self._experts.items())
        }


class AdapterFormat(Protocol):
    """One layout of adapter files."""

    layout: str

    def recognises(self, pair: FactorPair) -> bool:
        """Whether the pair's names belong to this layout."""
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
    """Return (lora_A, lora_B) as stored; what no other pair needs is removed, so that its memory is freed."""
    a = tensors[pair.a.name] if pair.shared == "A" else tensors.pop(pair.a.name)
    b = tensors[pair.b.name] if pair.shared == "B" else tensors.pop(pair.b.name)
    return a, b
