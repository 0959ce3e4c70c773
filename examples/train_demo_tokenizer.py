"""Train the demo tokenizer: byte-level BPE with DeepSeek's special tokens, single digits and single ideographs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import demo_corpus
import demo_tasks
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TASKS_WITH_WORDS = ("date-iso", "json-record", "number-words", "log-redact", "chinese-numerals")
MODEL_DIR = Path(__file__).resolve().parent.parent / "runtime" / "demo" / "model"


def training_texts(num_documents: int, seed: int) -> Iterator[str]:
    """Corpus documents, and one task sample after every eighth so that the answers' words have tokens too."""
    tasks = [demo_tasks.stream(task, seed, held_out=False) for task in TASKS_WITH_WORDS]
    for index, (_, sample) in enumerate(islice(demo_corpus.stream(seed), num_documents)):
        yield sample.prompt + sample.completion
        if index % 8 == 0:
            extra = next(tasks[index // 8 % len(tasks)])
            yield extra.prompt + extra.completion


def build_tokenizer(vocab_size: int, num_documents: int, seed: int) -> Tokenizer:
    """A byte-level BPE that round-trips any UTF-8 text and puts BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(num_documents, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the tokenizer_config.json that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 163840,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def main() -> None:
    """Write the tokenizer beside the demo model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save_tokenizer(build_tokenizer(args.vocab_size, args.documents, args.seed), args.out)


if __name__ == "__main__":
    main()
