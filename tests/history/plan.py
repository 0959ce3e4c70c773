"""What a storm is made of: who exists, how much of everything, and what is drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.marked_adapters import write_marked_adapter
from benchmarks.marked_model import FIRST_TOKEN, VOCAB_SIZE, text_of
from tests.history.records import Marks

BROKEN, NOBODY, COMPOSED = "broken", "nobody", "mix"
ALIASES = ("live", "canary", "old")
# The channel of a name's marks is that of its first letter.
LOADED = ("a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3")
ON_DEMAND = ("c0", "c1", "d0", "d1")
CHANNEL_OF = {"a": 0, "c": 0, "b": 1, "d": 1}
MAX_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Plan:
    """How large a storm is; the same seed draws the same calls, though not the same order of events."""

    seed: int = 1
    num_requests: int = 1000
    num_clients: int = 32
    num_operators: int = 4
    operator_pause_seconds: tuple[float, float] = (0.02, 0.15)


@dataclass
class Folders:
    """The adapters root: each folder is written once, with a mark that no other has."""

    root: Path
    num_marks: int = 0

    def write(self, name: str, *, folder: str = "") -> tuple[str, Marks]:
        """A new folder for a name; returns its path below the root, and its marks."""
        mark, channel = self.num_marks, channel_of(name)
        self.num_marks += 1
        path = self.root / (folder or f"{name}-{mark}")
        write_marked_adapter(path, channel, mark)
        return path.name, {channel: mark}

    def prepare(self) -> dict[str, Marks]:
        """What requests may register, by name, one that cannot be loaded among them."""
        names = {name: self.write(name, folder=name)[1] for name in ON_DEMAND}
        (self.root / BROKEN).mkdir()
        (self.root / BROKEN / "adapter_config.json").write_text("{", encoding="utf-8")
        return names | {BROKEN: {}}


def channel_of(name: str) -> int:
    """Which channel its marks are in."""
    return CHANNEL_OF[name[0]]


def draw_name(draw: random.Random) -> str:
    """Of all that may be named, the first ones most often."""
    names = (*LOADED, *ON_DEMAND)
    return draw.choices(names, weights=[1 / (1 + place % 4) for place in range(len(names))])[0]


def draw_adapter(draw: random.Random, generations: dict[str, int]) -> str:
    """What a request names; `generations` are those last heard of."""
    kind = draw.random()
    if kind < 0.14:
        return ""
    if kind < 0.24:
        return draw.choice(ALIASES)
    if kind < 0.40:
        return draw_sum(draw, generations)
    if kind < 0.42:
        return draw.choice((NOBODY, BROKEN))
    if kind < 0.45:
        return COMPOSED
    return draw_pinned(draw, draw_name(draw), generations, 0.12)


def draw_sum(draw: random.Random, generations: dict[str, int]) -> str:
    """Two parts in different channels."""
    parts = [draw.choice([name for name in (*LOADED, *ON_DEMAND) if channel_of(name) == channel]) for channel in (0, 1)]
    draw.shuffle(parts)
    weights = draw.choice((("", ""), ("0.7*", "0.3*"), ("0.5*", "0.5*"), ("", "0.4*")))
    named = [draw_pinned(draw, part, generations, 0.1) for part in parts]
    return "+".join(f"{weight}{part}" for weight, part in zip(weights, named, strict=True))


def draw_pinned(draw: random.Random, name: str, generations: dict[str, int], share: float) -> str:
    """The name, or now and then its generation that was last heard of."""
    if name in generations and draw.random() < share:
        return f"{name}@{generations[name]}"
    return name


def draw_prompt(draw: random.Random) -> tuple[str, int]:
    """A text, and its last token."""
    tokens = [draw.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(draw.randint(1, MAX_PROMPT_TOKENS))]
    return text_of(tokens), tokens[-1]
