"""When each generation may have been live, and when it surely was, as far as an outsider can know.

An operation takes effect at some moment between its call and its return. So the life of a generation has four ends:
it may be live from `from_earliest` to `to_latest`, and surely is from `from_latest` to `to_earliest`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from tests.history.records import History, Marks, Operation

LIVE_STATES = ("READY", "REGISTERED")
GONE_STATES = ("DRAINING", "UNLOADED")


@dataclass
class Life:
    """One generation of a name, or one target of an alias."""

    name: str
    generation: int
    marks: Marks
    from_earliest: float = math.inf
    from_latest: float = math.inf
    to_earliest: float = math.inf
    to_latest: float = math.inf


@dataclass
class Lives:
    """Of all names and aliases. `failed` are generations whose load came to nothing, which only requests that
    waited for them may name; `told` are contradictions between operations.
    """

    by_name: dict[str, dict[int, Life]] = field(default_factory=dict)
    aliases: dict[str, list[Life]] = field(default_factory=dict)
    present: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    failed: set[tuple[str, int]] = field(default_factory=set)
    told: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, history: History) -> Lives:
        """Everything that the operators' calls and the watch tell."""
        lives = cls()
        lives._begin(history)
        for name, generations in lives.by_name.items():
            unloads = [item for item in history.operations if _unloads(item) and item.name == name]
            lives._register(name, unloads, on_demand=name in history.on_demand)
            lives._end(generations, unloads)
        for change in history.changes:
            life = lives.by_name.get(change.name, {}).get(change.generation)
            if life is not None and change.state in GONE_STATES:
                life.to_latest = min(life.to_latest, change.seen)
        lives._find_presence(history)
        lives._follow_aliases(history)
        return lives

    def find(self, name: str, generation: int) -> Life | None:
        """A generation that an operator's answer or the watch has told of."""
        return self.by_name.get(name, {}).get(generation)

    def is_surely_present(self, name: str, start: float, end: float) -> bool:
        """Whether a request for this name cannot have missed it at any moment in between."""
        return any(low <= start and end <= high for low, high in self.present.get(name, []))

    def _begin(self, history: History) -> None:
        for operation in history.operations:
            if operation.kind == "load" and operation.generation:
                life = self._life(operation.name, operation.generation, operation.marks)
                life.from_earliest = min(life.from_earliest, operation.called)
                life.from_latest = min(life.from_latest, operation.returned)
        self.failed = {(change.name, change.generation) for change in history.changes if change.state == "FAILED"}
        for change in history.changes:
            is_known = change.name in history.on_demand or change.generation in self.by_name.get(change.name, {})
            if change.state in LIVE_STATES and is_known:
                life = self._life(change.name, change.generation, history.on_demand.get(change.name, {}))
                life.from_latest = min(life.from_latest, change.seen)

    def _life(self, name: str, generation: int, marks: Marks) -> Life:
        life = self.by_name.setdefault(name, {}).setdefault(generation, Life(name, generation, marks))
        if marks and life.marks and marks != life.marks:
            self.told.append(f"{name}@{generation} was answered for {life.marks} and for {marks}")
        life.marks = life.marks or marks
        return life

    def _register(self, name: str, unloads: list[Operation], *, on_demand: bool) -> None:
        """What no operator loaded can have come since the unload before."""
        for life in self.by_name[name].values():
            if on_demand and life.from_earliest == math.inf:
                before = [item.called for item in unloads if item.called <= life.from_latest]
                life.from_earliest = max(before, default=-math.inf)

    def _end(self, generations: dict[int, Life], unloads: list[Operation]) -> None:
        ordered = [generations[generation] for generation in sorted(generations)]
        for life, following in itertools.pairwise(ordered):
            life.to_earliest = min(life.to_earliest, following.from_earliest)
            life.to_latest = min(life.to_latest, following.from_latest)
        for life in ordered:
            for unload in unloads:
                if life.from_earliest > unload.returned:
                    continue
                life.to_earliest = min(life.to_earliest, max(unload.called, life.from_earliest))
                if life.from_latest <= unload.called:
                    life.to_latest = min(life.to_latest, unload.returned)

    def _find_presence(self, history: History) -> None:
        for name in {*self.by_name, *history.on_demand}:
            unloads = [item for item in history.operations if _unloads(item) and item.name == name]
            if name in history.on_demand:
                ends = sorted((item.called, item.returned) for item in unloads)
                starts = [-math.inf, *(returned for _, returned in ends)]
                self.present[name] = list(zip(starts, [*(called for called, _ in ends), math.inf], strict=True))
                continue
            loads = [item for item in history.operations if item.kind == "load" and item.generation and
                     item.name == name]  # fmt: skip
            self.present[name] = [
                (load.returned, min((item.called for item in unloads if item.returned > load.called), default=math.inf))
                for load in loads
            ]

    def _follow_aliases(self, history: History) -> None:
        """Each move of an alias ends what it stood for before; moves of one alias come one after the other."""
        moves = [item for item in history.operations if item.kind in ("alias", "unalias") and item.code == "OK"]
        for move in sorted(moves, key=lambda item: item.called):
            before = self.aliases.setdefault(move.name, [])
            if before and before[-1].to_latest == math.inf:
                before[-1].to_earliest, before[-1].to_latest = move.called, move.returned
            if move.kind == "alias":
                before.append(Life(move.target, 0, {}, move.called, move.returned))


def _unloads(operation: Operation) -> bool:
    """Whether it can have retired a generation: one that was refused has not."""
    return operation.kind == "unload" and (operation.code == "OK" or operation.reason == "ADAPTER_DRAINING")
