"""Pieces of a document that are tokenised apart, so that a prompt becomes the same ids as when it is served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loaders.tokenizer import Tokenizer
from runtime.trainer.data.errors import DataError

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


@dataclass(frozen=True, slots=True)
class Segment:
    """Token ids as they are, followed by the tokens of `text`; both are learnt or both only read.

    In `literal` text the spelling of a special token, or of one that marks a turn, stays ordinary text.
    """

    is_target: bool
    text: str = ""
    token_ids: tuple[int, ...] = ()
    literal: bool = False


class SegmentEncoder:
    """Tokenises segments, many at a time. `bos` is what the tokenizer itself puts in front of a text: an id or none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises DataError for a tokenizer without an end token."""
        if tokenizer.eos_token_id is None:
            raise DataError("tokenizer_config.json names no eos_token, the token that ends every answer: add it")
        self.eos_token_id: int = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        added = tokenizer.encode("")[:1]
        self.bos: tuple[int, ...] = tuple(added) if added == [self.bos_token_id] else ()
        # A copy of our own: what it does with special tokens is switched between calls.
        self._backend = _with_special_turn_marks(tokenizer.backend)
        self._added = {token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items()}

    def added_token(self, text: str) -> int | None:
        """The id of a token that is always recognised as a whole, or None."""
        return self._added.get(text)

    def spelling(self, token_id: int | None) -> str:
        """A token as the vocabulary writes it, "" for none."""
        return "" if token_id is None else self._backend.id_to_token(token_id) or ""

    def encode(
        self, documents: Sequence[Sequence[Segment]]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Per document its token ids [n] and, for each, whether it is learnt [n]; the first token never is."""
        encoded = iter(self._encode_texts([segment for segments in documents for segment in segments]))
        return [_join([(segment, next(encoded)) for segment in segments]) for segments in documents]

    def _encode_texts(self, segments: list[Segment]) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in segments]
        for literal in (False, True):
            chosen = [n for n, segment in enumerate(segments) if segment.text and segment.literal is literal]
            self._backend.encode_special_tokens = literal
            texts = [segments[n].text for n in chosen]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            for n, encoding in zip(chosen, encodings, strict=True):
                result[n] = encoding.ids
        return result


def _join(parts: list[tuple[Segment, list[int]]]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    lengths = [len(segment.token_ids) + len(ids) for segment, ids in parts]
    token_ids = [token_id for segment, ids in parts for token_id in (*segment.token_ids, *ids)]
    is_target = np.repeat([segment.is_target for segment, _ in parts], lengths)
    is_target[:1] = False  # no token before it predicts it
    return np.array(token_ids, np.int32), is_target


def _with_special_turn_marks(backend: Any) -> Any:
    """A copy in which the turn marks are special tokens too.

    DeepSeek publishes them as ordinary added tokens, which stay recognised where `encode_special_tokens` is set.
    """
    from tokenizers import Tokenizer as Backend

    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] or token["content"] in (USER, ASSISTANT)
    copy = Backend.from_str(json.dumps(content))
    copy.no_truncation()
    copy.no_padding()
    return copy
