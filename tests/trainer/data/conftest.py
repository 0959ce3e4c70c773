"""A small tokenizer with the tokens of DeepSeek-V3's, and JSONL files to read with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from loaders.tokenizer import Tokenizer
from runtime.trainer.config import DataConfig
from runtime.trainer.data.documents import DataReport, Document, read_documents
from tests.oracle.small_tokenizers import BOS, CORPUS, EOS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte level, BOS in front; User, Assistant and think are ordinary added tokens, as DeepSeek publishes them."""
    path = tmp_path_factory.mktemp("deepseek_tokenizer")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[BOS, EOS])
    backend.train_from_iterator(CORPUS, trainer)
    ordinary = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    backend.add_tokens([AddedToken(text, special=False) for text in ordinary])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    hf_tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "eos_token_id": 1}))
    return Tokenizer.from_dir(path)


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    """The demo's own: no tokens that mark turns."""
    return Tokenizer.from_dir(ROOT / "runtime/demo/model")


Read = Callable[..., tuple[list[Document], DataReport]]


@pytest.fixture
def read(tokenizer: Tokenizer, tmp_path: Path) -> Read:
    """Write rows (objects, or lines as they are) to rows.jsonl and read them; settings are those of DataConfig."""

    def read_rows(*rows: dict[str, Any] | bytes, using: Tokenizer = tokenizer, **settings: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return read_documents([path], DataConfig(train=(path,), **settings), using)

    return read_rows
