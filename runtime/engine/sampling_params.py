"""How one sequence picks its tokens and when it ends: plain data, checked at the edge by the server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GuideKind(StrEnum):
    """What a guide is written in: a JSON schema, a regular expression, a JSON list of strings, or a grammar."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class GuideSpec:
    """A rule that the generated text must follow to its end."""

    kind: GuideKind
    source: str


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one sequence. `temperature` 0 means greedy.

    Off are `top_k` 0, and `top_p`, `typical_p`, `repetition_penalty` and `length_penalty_factor` 1. The length penalty
    raises end-of-sequence tokens by `length_penalty_factor` to the power of the tokens beyond `length_penalty_start`.
    `logprobs` asks for details of generated tokens, `score_prompt` for those of the prompt's; both come with
    `num_top_tokens` alternatives.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    length_penalty_start: int = 0
    length_penalty_factor: float = 1.0
    logprobs: bool = False
    num_top_tokens: int = 0
    score_prompt: bool = False
    guide: GuideSpec | None = None

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
            ("typical_p", self.typical_p, 0.0 < self.typical_p <= 1.0, "above 0, at most 1"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0..2^64-1"),
            ("repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty <= 2.0, "above 0, at most 2"),
            ("length_penalty_start", self.length_penalty_start, self.length_penalty_start >= 0, ">= 0"),
            (
                "length_penalty_factor",
                self.length_penalty_factor,
                1.0 <= self.length_penalty_factor <= 10.0,
                "1..10",
            ),
            ("num_top_tokens", self.num_top_tokens, 0 <= self.num_top_tokens <= 10, "0..10"),
        )
        for name, value, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name} = {value!r} is out of range: {allowed}")
