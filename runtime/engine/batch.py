"""What one step computes: plain data, the one thing that other ranks need to be told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.engine.messages import RequestId


@dataclass(frozen=True)
class PromptTargets:
    """Prompt tokens to score: `token_ids[i]` is the one after the chunk's token `first_row + i`."""

    first_row: int
    token_ids: list[int]
    num_top_tokens: int


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence, at positions `start`.. of its cache `blocks`.

    `slot` is the adapter's device slot (-1: base); `samples` tells whether a new token follows from the last one.
    `targets` are there only if the request asked for scores of its prompt.
    """

    request_id: RequestId
    token_ids: list[int]
    start: int
    blocks: list[int]
    slot: int
    samples: bool
    targets: PromptTargets | None = None


@dataclass(frozen=True)
class Batch:
    """Chunks ordered by adapter slot, so that the tokens of one adapter are contiguous."""

    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def sampling_only(self, request_ids: set[RequestId]) -> Batch:
        """The same batch in which only these requests sample."""
        chunks = [replace(chunk, samples=chunk.samples and chunk.request_id in request_ids) for chunk in self.chunks]
        return Batch(chunks)
