"""How long prompts and outputs are: a fixed number of tokens, a uniform range, or a lognormal distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Protocol


class Lengths(Protocol):
    """A distribution of token counts, each at least 1, written as `parse_lengths` reads it.

    `largest` is None if it has no upper end.
    """

    @property
    def largest(self) -> int | None: ...
    def sample(self, rng: Random) -> int: ...


@dataclass(frozen=True)
class Uniform:
    """Every whole number from `low` to `high`, both included, equally often; a fixed length if they are the same."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"

    @property
    def largest(self) -> int | None:
        """The upper end."""
        return self.high

    def sample(self, rng: Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class LogNormal:
    """exp(normal(log(median), sigma)), rounded: many short ones and a long tail, like real prompts."""

    median: float
    sigma: float

    def __str__(self) -> str:
        return f"lognormal:{self.median:g}:{self.sigma:g}"

    @property
    def largest(self) -> int | None:
        """There is none."""
        return None

    def sample(self, rng: Random) -> int:
        """One length."""
        return max(1, round(rng.lognormvariate(math.log(self.median), self.sigma)))


def parse_lengths(text: str, name: str) -> Lengths:
    """From `N`, `LOW:HIGH` or `lognormal:MEDIAN:SIGMA`; raises ValueError that names the option."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "lognormal":
            median, sigma = (float(number) for number in rest.split(":"))
            if 1 <= median < math.inf and 0 < sigma <= 5:
                return LogNormal(median, sigma)
        else:
            low = int(kind)
            high = int(rest) if rest else low
            if 1 <= low <= high:
                return Uniform(low, high)
    except ValueError:
        pass  # said below, with what is allowed
    allowed = "N, LOW:HIGH with 1 <= LOW <= HIGH, or lognormal:MEDIAN:SIGMA with MEDIAN >= 1 and 0 < SIGMA <= 5"
    raise ValueError(f"{name} = {text!r} is out of range: {allowed}")
