"""What a client is told of one request: fmaas messages from what the engine gave."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

from loaders.tokenizer import Tokenizer
from runtime.engine.messages import TokenScore, TopToken
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server.generation import PreparedRequest, Progress
from runtime.server.validation import ResponseDetail


class Scored(Protocol):
    """What the model thought of a token, given or generated."""

    @property
    def logprob(self) -> float: ...
    @property
    def rank(self) -> int: ...
    @property
    def top_tokens(self) -> list[TopToken]: ...


def head(prepared: PreparedRequest, scores: Sequence[TokenScore], tokenizer: Tokenizer) -> pb.GenerationResponse:
    """What is known before the first token; `scores` are those of the prompt from its second token on, if asked for."""
    detail = prepared.options.detail
    response = pb.GenerationResponse(input_token_count=len(prepared.prompt_ids))
    if not prepared.options.is_greedy:
        response.seed = prepared.params.seed
    if detail.input_text:
        response.text = prepared.prompt
    if detail.input_tokens:
        # Nothing comes before the first token, so it has no score.
        for token_id, score in zip_longest(prepared.prompt_ids, [None, *scores]):
            response.input_tokens.append(_token_info(token_id, score, detail, tokenizer))
    return response


def delta(prepared: PreparedRequest, progress: Progress, tokenizer: Tokenizer) -> pb.GenerationResponse:
    """What is new."""
    response = pb.GenerationResponse(
        text=progress.text,
        generated_token_count=progress.num_generated,
        stop_reason=progress.stop_reason,
        stop_sequence=progress.stop_sequence,
    )
    detail = prepared.options.detail
    if detail.generated_tokens:
        for output in progress.outputs:
            response.tokens.append(_token_info(output.token_id, output, detail, tokenizer))
    return response


def _token_info(token_id: int, score: Scored | None, detail: ResponseDetail, tokenizer: Tokenizer) -> pb.TokenInfo:
    info = pb.TokenInfo(text=tokenizer.token_piece(token_id))
    if score is None:
        return info
    if detail.logprobs:
        info.logprob = score.logprob
    if detail.ranks:
        info.rank = score.rank
    for top in score.top_tokens[: detail.num_top_tokens]:
        alternative = info.top_tokens.add(text=tokenizer.token_piece(top.token_id))
        if detail.logprobs:
            alternative.logprob = top.logprob
    return info
