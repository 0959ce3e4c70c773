"""From token ids to final text, cut at the first stop sequence wherever the borders of the tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Detokenizer(Protocol):
    """Gives text that later tokens cannot change any more."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True)
class TextUpdate:
    """New text that may be shown, and the stop sequence that ended it, if one did."""

    text: str
    stop_sequence: str | None = None


class TextStream:
    """The text of one sequence. What may be the start of a stop sequence is held back until that is known.

    A stop sequence counts from the token on that fills `min_new_tokens`; the one that is complete first wins.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], include_stop: bool = True, min_new_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._min_new_tokens = min_new_tokens
        self._num_tokens = 0
        self._held = ""

    def push(self, token_id: int) -> TextUpdate:
        """Take the next token."""
        self._num_tokens += 1
        return self._extend(self._detokenizer.push(token_id))

    def finish(self) -> TextUpdate:
        """The sequence has ended: everything that was held back."""
        update = self._extend(self._detokenizer.flush())
        if update.stop_sequence is not None:
            return update
        held, self._held = self._held, ""
        return TextUpdate(update.text + held)

    def _extend(self, new: str) -> TextUpdate:
        if not self._stops:
            return TextUpdate(new)
        text = self._held + new
        if self._num_tokens >= self._min_new_tokens and (found := self._first_stop(text, len(self._held))):
            start, stop = found
            self._held = ""
            return TextUpdate(text[: start + len(stop) if self._include_stop else start], stop)
        border = self._possible_start(text)
        self._held = text[border:]
        return TextUpdate(text[:border])

    def _first_stop(self, text: str, old_length: int) -> tuple[int, str] | None:
        """The stop sequence that ends first within the new text (the longest of those that end there)."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, old_length - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _possible_start(self, text: str) -> int:
        """Where the longest tail begins that is a proper beginning of a stop sequence."""
        border = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < border:
                if stop.startswith(text[start:]):
                    border = start
                    break
                start = text.find(stop[0], start + 1)
        return border
