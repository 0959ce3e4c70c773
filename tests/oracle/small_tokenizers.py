"""Small tokenizers in the manner of DeepSeek (byte level) and of Llama (sentence pieces with byte fallback)."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "日本語のテキスト、中文文本。",
    "naïve café — 12345",
    "🙂🚀",
]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # DeepSeek's own spelling


def save_byte_level(path: Path) -> Path:
    """A small byte-level BPE in DeepSeek's manner: BOS added in front, special and ordinary added tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[BOS, EOS])
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("→去", special=False)])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "eos_token_id": [1, 7]}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    return path


def save_sentence_pieces(path: Path) -> Path:
    """A vocabulary in Llama's manner: spaces as U+2581, bytes as <0x..> tokens, the first space stripped."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "b", "é", "the"]
    backend = Backend(
        models.BPE({token: n for n, token in enumerate(vocab)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path
