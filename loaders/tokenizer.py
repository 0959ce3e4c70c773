"""The model's tokenizer: text to token ids and back, from local files only and without running code from them."""

from functools import cached_property
from pathlib import Path
from typing import Any

from loaders.config_json import MAX_CONFIG_BYTES, read_eos_token_ids
from loaders.detokenizer import BytePieces, IncrementalDetokenizer, is_byte_level
from loaders.errors import CheckpointError
from loaders.json_file import read_json_object

__all__ = ["IncrementalDetokenizer", "Tokenizer"]


class Tokenizer:
    """A fast Hugging Face tokenizer; `from_dir` loads it."""

    def __init__(self, hf_tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        """Wrap a loaded `PreTrainedTokenizerFast`-like object."""
        self._hf = hf_tokenizer
        self.eos_token_ids = eos_token_ids
        self.bos_token_id: int | None = hf_tokenizer.bos_token_id
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        self.vocab_size: int = len(hf_tokenizer)

    @classmethod
    def from_dir(cls, path: Path) -> "Tokenizer":
        """Load tokenizer.json and its settings from a model directory; raises CheckpointError."""
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(f"{path}: no tokenizer.json{_how_to_convert(path)}")
        hf_tokenizer = _load(path)
        _add_bos_as_published(hf_tokenizer, path / "tokenizer_config.json")
        return cls(hf_tokenizer, read_eos_token_ids(path))

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` underneath."""
        return self._hf.backend_tokenizer

    @cached_property
    def byte_pieces(self) -> BytePieces | None:
        """What the tokens of a byte-level vocabulary stand for; None for other vocabularies."""
        return BytePieces(self.backend) if is_byte_level(self.backend) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with BOS where the model's tokenizer adds it."""
        return list(self._hf(text, verbose=False)["input_ids"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, its (start, end) in characters of `text`; (0, 0) for tokens that were added."""
        encoded = self._hf(text, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [(int(start), int(end)) for start, end in encoded["offset_mapping"]]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        # transformers' cleaning of spaces would make the text of a token depend on the ones after it.
        text: str = self._hf.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

    def token_piece(self, token_id: int) -> str:
        """A token as the vocabulary writes it (spaces as U+0120 or U+2581, say); "" for ids beyond the vocabulary.

        Unlike its decoded text, this tells the parts of one character apart.
        """
        piece: str | None = self.backend.id_to_token(token_id)
        return "" if piece is None else piece


def _load(path: Path) -> Any:
    """tokenizer.json as it is: AutoTokenizer would rebuild it by the class that the settings name, and import torch."""
    from transformers import PreTrainedTokenizerFast  # a second to import: only where it is used

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as cause:  # transformers and tokenizers raise plain ones
        reason = f"{type(cause).__name__}: {str(cause)[:200]}"
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded ({reason})") from cause


def _add_bos_as_published(hf_tokenizer: Any, settings: Path) -> None:
    """DeepSeek's models were trained with BOS in front, which only `add_bos_token` of their settings says.

    LlamaTokenizerFast obeys it in transformers 4; transformers 5 drops it whenever there is a tokenizer.json.
    """
    if not settings.is_file():
        return
    config = read_json_object(settings, MAX_CONFIG_BYTES, CheckpointError)
    obeys = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    bos = hf_tokenizer.bos_token_id
    if obeys and config.get("add_bos_token") is True and bos is not None and bos not in hf_tokenizer("")["input_ids"]:
        hf_tokenizer.add_bos_token = True


def _how_to_convert(path: Path) -> str:
    if any(path.glob("tiktoken*")) or any(path.glob("tokenization_*.py")):
        return (
            "; this model carries a tiktoken vocabulary with code of its own (Kimi, Moonlight), which is not run. "
            "Make a tokenizer.json once, where that code is trusted: load the tokenizer with trust_remote_code=True, "
            "pass its `model` to transformers.integrations.tiktoken.convert_tiktoken_to_fast, and put the file here"
        )
    return "; copy it from where the weights were downloaded (a fast tokenizer is needed)"
