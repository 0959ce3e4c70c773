"""Chats written out as DeepSeek's models read them, and plain text: examples -> segments, each learnt or only read."""

from __future__ import annotations

from collections.abc import Callable

from runtime.trainer.data.errors import DataError
from runtime.trainer.data.formats import Chat, Example, PlainText, Turn
from runtime.trainer.data.segments import ASSISTANT, USER, Segment, SegmentEncoder


class Template:
    """Writes examples out. `deepseek` marks turns by tokens of their own (V3, R1), `plain` by words (V2)."""

    def __init__(self, name: str, encoder: SegmentEncoder) -> None:
        """`name` is one of config.TEMPLATES."""
        self._encoder = encoder
        self._eos = (encoder.eos_token_id,)
        self._chat_bos = () if encoder.bos_token_id is None else (encoder.bos_token_id,)
        self._write_chat: Callable[[Chat], list[Segment]] = {"deepseek": self._deepseek, "plain": self._plain}[name]

    def segments(self, example: Example) -> list[Segment]:
        """The whole document with BOS and EOS; raises DataError if the tokenizer has no tokens for the turns."""
        return self._write_chat(example) if isinstance(example, Chat) else self._without_template(example)

    def _without_template(self, example: PlainText) -> list[Segment]:
        """BOS as the tokenizer puts it in front of a served prompt, and EOS; neither twice if the text spells it."""
        prompt, completion = example.prompt, example.completion
        bos = self._encoder.spelling(self._encoder.bos[0]) if self._encoder.bos else ""
        if prompt:
            prompt = prompt.removeprefix(bos)
        else:
            completion = completion.removeprefix(bos)
        completion = completion.removesuffix(self._encoder.spelling(self._encoder.eos_token_id))
        return [
            Segment(is_target=False, token_ids=self._encoder.bos, text=prompt),
            Segment(is_target=True, text=completion),
            Segment(is_target=True, token_ids=self._eos),
        ]

    def _deepseek(self, chat: Chat) -> list[Segment]:
        user, assistant = self._turn_mark(USER), self._turn_mark(ASSISTANT)
        segments = [Segment(is_target=False, token_ids=self._chat_bos, text=_system(chat), literal=True)]
        for turn in chat.turns:
            if turn.role == "user":
                segments.append(Segment(is_target=False, token_ids=user, text=turn.content, literal=True))
            elif turn.role == "assistant":
                segments.append(Segment(is_target=False, token_ids=assistant))
                segments += self._answer(turn, turn.content)
        return segments

    def _plain(self, chat: Chat) -> list[Segment]:
        segments = [Segment(is_target=False, token_ids=self._chat_bos)]
        system = _system(chat)
        read = f"{system}\n\n" if system else ""
        for turn in chat.turns:
            if turn.role == "user":
                read += f"User: {turn.content}\n\n"
            elif turn.role == "assistant":
                segments.append(Segment(is_target=False, text=f"{read}Assistant:", literal=True))
                segments += self._answer(turn, f" {turn.content}")
                read = ""
        return [*segments, Segment(is_target=False, text=read, literal=True)]

    def _answer(self, turn: Turn, text: str) -> list[Segment]:
        return [
            Segment(is_target=turn.is_target, text=text, literal=True),
            Segment(is_target=turn.is_target, token_ids=self._eos),
        ]

    def _turn_mark(self, mark: str) -> tuple[int]:
        token_id = self._encoder.added_token(mark)
        if token_id is None:
            raise DataError(f"the model's tokenizer has no token {mark}, which marks turns: set data.template: plain")
        return (token_id,)


def _system(chat: Chat) -> str:
    return "\n\n".join(turn.content for turn in chat.turns if turn.role == "system")
