"""Text from a stream of tokens: what is final is given out at once, never half a character.

Byte-level vocabularies (DeepSeek, Kimi) spread a character over several tokens. Their decoder joins the bytes of all
tokens and reads them as UTF-8 with replacement, which an incremental UTF-8 decoder does in constant time per token.
Other vocabularies take the general way: decode a short window twice and give out the difference.
"""

import codecs
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; more unfinished tokens than this are not one character


class IncrementalDetokenizer:
    """Turns token ids pushed one by one into text; all pieces joined equal `tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: "Tokenizer", skip_special: bool = True) -> None:
        """One detokenizer serves one sequence."""
        pieces = tokenizer.byte_pieces
        self._impl: _ByteLevel | _Window
        if pieces is not None:
            self._impl = _ByteLevel(pieces, skip_special)
        else:
            self._impl = _Window(tokenizer, skip_special)

    def push(self, token_id: int) -> str:
        """The text that became final with this token, often empty inside a character."""
        return self._impl.push(token_id)

    def flush(self) -> str:
        """The rest, at the end of the sequence; an unfinished character becomes U+FFFD."""
        return self._impl.flush()


def is_byte_level(backend: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` decodes by joining bytes (its decoder is ByteLevel and nothing else)."""
    decoder = backend.decoder
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    parts = state.get("decoders", []) if state.get("type") == "Sequence" else [state]
    kinds = {part.get("type") for part in parts}
    return "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: visible Latin-1 stands for itself, the rest for U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in visible]
    table.update({chr(0x100 + n): byte for n, byte in enumerate(hidden)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


def token_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; added tokens with other characters stand for their own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


class BytePieces:
    """The bytes of each token of a byte-level vocabulary, looked up once for all sequences."""

    def __init__(self, backend: Any) -> None:
        """Of a `tokenizers.Tokenizer`."""
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder().items()
        self.special_ids = frozenset(token_id for token_id, token in added if token.special)
        self.characters: dict[int, str] = {}
        """The text of the tokens met so far that are whole characters."""

    def bytes_of(self, token_id: int) -> bytes:
        """None at all for ids beyond the vocabulary."""
        data = self._bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            data = b"" if token is None else token_bytes(token)
            self._bytes[token_id] = data
            with suppress(UnicodeDecodeError):
                self.characters[token_id] = data.decode()
        return data


class _ByteLevel:
    def __init__(self, pieces: BytePieces, skip_special: bool) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skipped = pieces.special_ids if skip_special else frozenset()
        self._is_inside_character = False

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if not self._is_inside_character:
            text = self._pieces.characters.get(token_id)
            if text is not None:
                return text
        text = self._decoder.decode(self._pieces.bytes_of(token_id))
        self._is_inside_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Decodes ids[prefix:] and ids[prefix:read]; their difference is new text, unless it ends inside a character."""

    def __init__(self, tokenizer: "Tokenizer", skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._emitted: list[str] = []

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        is_unfinished = now.endswith(_REPLACEMENT) and len(self._ids) - self._read < _MAX_HELD_TOKENS
        if is_unfinished or not now.startswith(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._emit(now[len(before) :])

    def flush(self) -> str:
        emitted = "".join(self._emitted)
        text = self._decode(self._ids)
        return self._emit(text[len(emitted) :]) if text.startswith(emitted) else ""

    def _emit(self, text: str) -> str:
        self._emitted.append(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)
