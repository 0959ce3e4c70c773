"""Drives one guide process as the engine's lane does, a sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtime import demo
from runtime.engine.guides.process import GuideProcess
from runtime.engine.guides.protocol import AdvanceGuide, Allowed, Answer, CheckGuide, CloseGuide, OpenGuide, WorkerSetup
from runtime.engine.guides.store import make_setup
from runtime.engine.sampling_params import GuideKind, GuideSpec

DEMO_SETUP = make_setup(str(demo.MODEL_DIR / "tokenizer.json"), 1024, [1], cache_entries=8, compile_seconds=5.0)


class Follower:
    """Answers are sets of allowed token ids; what is refused comes back as the process said it."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.process = GuideProcess(setup)
        self.vocab_size = setup.vocab_size

    def check(self, kind: GuideKind, source: str) -> Answer:
        """Whether a guide can be followed."""
        self.process.ensure_started()
        (answer,) = self.process.ask([CheckGuide(kind, source)])
        return answer

    def open(self, spec: GuideSpec, token_ids: list[int] | None = None) -> set[int]:
        """The tokens allowed at first, or after some; the sequence that was followed before is closed."""
        self.process.ensure_started()
        (answer,) = self.process.ask([CloseGuide(1), OpenGuide(1, spec.kind, spec.source, token_ids or [])])
        return self.ids(answer)

    def advance(self, token_id: int) -> set[int]:
        """The tokens allowed after one more."""
        (answer,) = self.process.ask([AdvanceGuide(1, token_id)])
        return self.ids(answer)

    def ids(self, answer: Answer) -> set[int]:
        """The set bits of a mask."""
        assert isinstance(answer, Allowed), answer
        assert len(answer.bits) * 8 >= self.vocab_size
        return {bit for bit in range(len(answer.bits) * 8) if answer.bits[bit >> 3] >> (bit & 7) & 1}


@contextmanager
def following(setup: WorkerSetup = DEMO_SETUP, **changes: object) -> Iterator[Follower]:
    """A follower whose process is ended afterwards."""
    follower = Follower(replace(setup, **changes))  # type: ignore[arg-type]
    try:
        yield follower
    finally:
        follower.process.close()


def write_tokenizer(path: Path, tokens: list[str]) -> dict[str, int]:
    """A byte-level tokenizer.json of these texts, each a token, after `<eos>` (id 0); returns text -> id."""
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    vocab = {"<eos>": 0} | {encode(text)[0][0]: number for number, text in enumerate(tokens, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    return {text: number for number, text in enumerate(tokens, 1)}
