"""What one step computes: plain data, the one thing that other ranks need to be told."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.engine.messages import RequestId


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence, at positions `start`.. of its cache `blocks`.

    `slot` is the adapter's device slot (-1: base); `samples` tells whether a new token follows from the last one.
    """

    request_id: RequestId
    token_ids: list[int]
    start: int
    blocks: list[int]
    slot: int
    samples: bool


@dataclass(frozen=True)
class Batch:
    """Chunks ordered by adapter slot, so that the tokens of one adapter are contiguous."""

    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)
