"""Inside a guide process: compiled guides, one matcher for each sequence, and what each may cost.

Copies of a matcher share the states of its lexer, which makes masks fast where many requests bring the same guide. The
library's limits count for all copies together, so a copy that fails is first tried again by a matcher of its own: what
happens to a request depends on its own text only.
"""

from __future__ import annotations

import json
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from runtime.engine.guides.grammar import NOTHING_FOLLOWS, GuideError, library_error, to_grammar
from runtime.engine.guides.protocol import WorkerSetup
from runtime.engine.sampling_params import GuideKind, GuideSpec

# The library's own limits bound memory well, but not time: those are its defaults, and time is counted here.
_LIMITS = LLParserLimits(verbose_errors=False)
FREE_CPU_SECONDS = 0.5
CPU_SECONDS_PER_TOKEN = 0.01


@dataclass
class _Compiled:
    """A matcher that has seen no token, and how many sequences have got a copy."""

    matcher: LLMatcher
    num_copies: int = 0


@dataclass
class _Followed:
    """One sequence's guide; `cpu_seconds` is what its masks have cost."""

    spec: GuideSpec
    compiled: _Compiled
    matcher: LLMatcher
    token_ids: list[int]
    cpu_seconds: float = 0.0


class Matchers:
    """Every method may raise GuideError, and is ended with the whole process if it takes too long."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._tokenizer = load_tokenizer(setup)
        self._cache: OrderedDict[GuideSpec, _Compiled] = OrderedDict()
        self._followed: dict[int, _Followed] = {}

    def check(self, spec: GuideSpec) -> None:
        """Compile and compute the first mask."""
        with time_limit(self._setup.compile_seconds):
            self._bits(spec, self._compile(spec).matcher)

    def open(self, guide_id: int, spec: GuideSpec, token_ids: list[int]) -> bytes:
        """Follow a guide from the start, or after tokens; returns the tokens that may come next."""
        with time_limit(2 * self._setup.compile_seconds):
            compiled = self._cached(spec)
            followed = _Followed(spec, compiled, _copy(compiled, token_ids), list(token_ids))
            self._followed[guide_id] = followed
            return self._bits_or_retry(followed)

    def advance(self, guide_id: int, token_id: int) -> bytes:
        """One more token; returns the tokens that may come next."""
        followed = self._followed[guide_id]
        started = time.process_time()
        with time_limit(self._setup.step_seconds):
            followed.token_ids.append(token_id)
            followed.matcher.consume_token(token_id)
            bits = self._bits_or_retry(followed)
        followed.cpu_seconds += time.process_time() - started
        if followed.cpu_seconds > FREE_CPU_SECONDS + CPU_SECONDS_PER_TOKEN * len(followed.token_ids):
            message = f"following it has taken {followed.cpu_seconds:.1f} s for {len(followed.token_ids)} tokens"
            raise GuideError("GUIDE_TOO_COMPLEX", message)
        return bits

    def close(self, guide_id: int) -> None:
        """Forget a sequence; it may be unknown."""
        self._followed.pop(guide_id, None)

    def _cached(self, spec: GuideSpec) -> _Compiled:
        """Compile a guide or take it from the cache, where the least recently used one gives way to a new one."""
        compiled = self._cache.pop(spec, None) or self._compile(spec)
        self._cache[spec] = compiled
        while len(self._cache) > self._setup.cache_entries:
            self._cache.popitem(last=False)
        return compiled

    def _compile(self, spec: GuideSpec) -> _Compiled:
        matcher = LLMatcher(self._tokenizer, to_grammar(spec), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise library_error(matcher.get_error())
        return _Compiled(matcher)

    def _bits_or_retry(self, followed: _Followed) -> bytes:
        try:
            return self._bits(followed.spec, followed.matcher)
        except GuideError:
            if followed.compiled.num_copies == 1:
                raise
        if self._cache.get(followed.spec) is followed.compiled:
            del self._cache[followed.spec]
        with time_limit(2 * self._setup.compile_seconds):
            followed.compiled = self._compile(followed.spec)
            followed.matcher = _copy(followed.compiled, followed.token_ids)
            return self._bits(followed.spec, followed.matcher)

    def _bits(self, spec: GuideSpec, matcher: LLMatcher) -> bytes:
        """The mask; end tokens only where the text is complete, and no token that the tokenizer does not know."""
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            raise library_error(matcher.get_error())
        if spec.kind is not GuideKind.GRAMMAR:
            return bits
        forbidden = [] if matcher.is_accepting() else self._setup.eos_token_ids
        if "<[" in spec.source:
            forbidden = [*forbidden, *self._unknown_ids]
        allowed = bytearray(bits)
        for token_id in forbidden:
            allowed[token_id >> 3] &= ~(1 << (token_id & 7))
        if not any(allowed):
            raise GuideError("GUIDE_INVALID", NOTHING_FOLLOWS)
        return bytes(allowed)

    @cached_property
    def _unknown_ids(self) -> list[int]:
        """Ids of the model's vocabulary that the tokenizer does not have; it shows them by their number."""
        decode = self._tokenizer.decode_bytes
        return [token_id for token_id in range(self._setup.vocab_size) if decode([token_id]) == b"<[%d]>" % token_id]


def _copy(compiled: _Compiled, token_ids: list[int]) -> LLMatcher:
    """A copy that has seen these tokens."""
    compiled.num_copies += 1
    matcher = compiled.matcher.deep_copy()
    matcher.consume_tokens(token_ids)
    return matcher


def load_tokenizer(setup: WorkerSetup) -> LLTokenizer:
    """The model's tokenizer as the library needs it; raises GuideError with what is wrong with the file."""
    try:
        text = Path(setup.tokenizer).read_text(encoding="utf-8")
        settings = json.loads(text)
        if settings.get("truncation") or settings.get("padding"):
            text = json.dumps({**settings, "truncation": None, "padding": None})
        return LLTokenizer(text, n_vocab=setup.vocab_size, eos_token=setup.eos_token_ids)
    except (OSError, ValueError, AttributeError) as cause:
        message = f"this model's tokenizer.json does not serve for guided decoding: {str(cause)[:200]}"
        raise GuideError("GUIDES_UNAVAILABLE", message) from cause


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM if the block takes longer: not even the library's own loops can hold it up."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
