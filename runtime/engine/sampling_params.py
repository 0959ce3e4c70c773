"""How one sequence picks its tokens and when it ends: plain data, checked at the edge by the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one sequence. `temperature` 0 means greedy; `top_k` 0 and `top_p` 1 mean off."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False
    num_top_tokens: int = 0

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and the allowed range."""
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1"),
            (
                "min_new_tokens",
                self.min_new_tokens,
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"0..max_new_tokens ({self.max_new_tokens})",
            ),
            ("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0..100"),
            ("top_k", self.top_k, self.top_k >= 0, ">= 0"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0..2^64-1"),
            ("num_top_tokens", self.num_top_tokens, 0 <= self.num_top_tokens <= 10, "0..10"),
        )
        for name, value, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name} = {value!r} is out of range: {allowed}")
