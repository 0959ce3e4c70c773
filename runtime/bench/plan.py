"""What a benchmark is asked to do; together with the server's limits it decides every request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from runtime.bench.lengths import Lengths, Uniform

BASE = ""
DEFAULT_TOKENS = Uniform(64, 64)


@dataclass(frozen=True)
class BenchPlan:
    """Zero means "not so": `rate` 0 is a closed loop, `seconds` 0 ends after `num_requests`.

    `concurrency` is how many requests a closed loop keeps running; with a rate (requests a second), the most that may
    run at once, and 0 sets no bound. `adapters` maps names to weights; the base is `BASE`.
    """

    server: str
    num_requests: int = 100
    seconds: float = 0.0
    concurrency: int = 8
    rate: float = 0.0
    adapters: tuple[tuple[str, float], ...] = ((BASE, 1.0),)
    prompt_tokens: Lengths = DEFAULT_TOKENS
    output_tokens: Lengths = DEFAULT_TOKENS
    prompts_path: Path | None = None
    stop_at_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    num_warmup: int = 4
    timeout_seconds: float = 600.0
    num_connections: int = 1
    metrics_address: str = ""

    @property
    def is_open_loop(self) -> bool:
        """Whether requests arrive by the clock, whatever the server does."""
        return self.rate > 0

    def validate(self) -> None:
        """Raise ValueError naming the option, its value and the allowed range."""
        _require(math.isfinite(self.seconds) and self.seconds >= 0, "--seconds", self.seconds, "> 0")
        if not self.seconds:
            _require(1 <= self.num_requests <= 10**7, "--requests", self.num_requests, "1..10000000")
        _require(math.isfinite(self.rate) and self.rate >= 0, "--rate", self.rate, "> 0")
        least = 0 if self.is_open_loop else 1
        _require(least <= self.concurrency <= 10_000, "--concurrency", self.concurrency, f"{least}..10000")
        names = [name for name, _ in self.adapters]
        _require(bool(names) and len(set(names)) == len(names), "--adapter", names, "each name once")
        for name, weight in self.adapters:
            _require(math.isfinite(weight) and weight > 0, f"--adapter {name}", weight, "a weight > 0")
        _require(0 <= self.temperature <= 100, "--temperature", self.temperature, "0 (greedy)..100")
        _require(0 <= self.num_warmup <= 10_000, "--warmup", self.num_warmup, "0..10000")
        _require(0 < self.timeout_seconds <= 86_400, "--timeout", self.timeout_seconds, "> 0, at most 86400 s")
        _require(1 <= self.num_connections <= 256, "--connections", self.num_connections, "1..256")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r} is out of range: {allowed}")
