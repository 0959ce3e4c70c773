"""Guides that would take for ever are refused in bounded time, and nobody else waits for them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from loaders.tokenizer import Tokenizer
from runtime import demo
from runtime.config import EngineConfig
from runtime.engine.messages import FinishReason, RequestFailed, RequestId
from runtime.engine.sampling_params import GuideKind, GuideSpec, SamplingParams
from runtime.errors import ErrorKind
from tests.conftest import RecordNumber
from tests.oracle.driver import Driver, driven_engine

COMPILE_SECONDS = 1.0
SCHEMA, REGEX, CHOICE, GRAMMAR = GuideKind.JSON_SCHEMA, GuideKind.REGEX, GuideKind.CHOICE, GuideKind.GRAMMAR


def _bomb(size: int) -> str:
    return " & ".join(f"/.*a.{{{count}}}/" for count in range(1, size))


def _terminals(size: int) -> str:
    rules = "".join(f"R{index}: R{index + 1} R{index + 1}\n" for index in range(size))
    return f'start: R0\n{rules}R{size}: "a"\n'


def _rules(size: int) -> str:
    rules = "".join(f"r{index}: r{index + 1} r{index + 1}\n" for index in range(size))
    return f'start: r0\n{rules}r{size}: "a"\n'


def _all_of(size: int) -> str:
    parts = [
        {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {"type": "string", "pattern": f"^a{{{i + 1}}}"}},
                    "required": [f"p{i}_{j}"]} for j in range(2)]}
        for i in range(size)
    ]  # fmt: skip
    return json.dumps({"allOf": parts})


def _patterns(size: int) -> str:
    return json.dumps({"allOf": [{"type": "string", "pattern": f"{chr(97 + i % 26)}.{{{i}}}{chr(98 + i % 24)}"}
                                 for i in range(size)]})  # fmt: skip


REFUSED = {
    "6400 optional letters": (REGEX, "(a?b?c?d?)" * 1600),
    "overlapping alternatives": (REGEX, "(a|ab|abc|abcd|bcd|cd|d)*" * 600),
    "every script": (REGEX, r"(\p{L}|\p{N}|\p{P})*" * 780),
    "a billion letters": (REGEX, "a{1000000000}"),
    "8000 parentheses": (REGEX, "(" * 8000 + "a" + ")" * 8000),
    "a multiple of a large prime": (SCHEMA, json.dumps({"type": "integer", "multipleOf": 1000003, "minimum": 1})),
    "all of 40 choices": (SCHEMA, _all_of(40)),
    "all of 250 patterns": (SCHEMA, _patterns(250)),
    "8000 brackets": (SCHEMA, '{"const":' + "[" * 8000 + "]" * 8000 + "}"),
    "terminals that double 800 times": (GRAMMAR, _terminals(800)),
    "an intersection of 60 patterns": (GRAMMAR, f"start: A\nA: {_bomb(60)}"),
    "an intersection of 600 patterns": (GRAMMAR, f"start: A\nA: {_bomb(600)}"),
    "rules that double 60 times": (GRAMMAR, _rules(60)),
    "8000 groups": (GRAMMAR, "start: " + "(" * 8000 + '"a"' + ")" * 8000),
    "8000 groups of GBNF": (GRAMMAR, "root ::= " + "(" * 8000 + '"a"' + ")" * 8000),
}
# Compiling this takes about as long as it may, so whether it is refused is up to the machine.
BORDERLINE = (REGEX, "a?" * 8000)
# These look as bad, but the library builds only what a text comes to.
HARMLESS = {
    "counts in a count": (REGEX, "(a{1,500}){1,500}"),
    "counts in counts in counts": (REGEX, "((([a-z]{1,1000}){1,1000}){1,1000}){1,1000}"),
    "a letter 200 before the end": (REGEX, ".*a.{200}"),
    "16 KiB of letters": (REGEX, "a" * 16_384),
    "a billion items": (SCHEMA, json.dumps({"type": "array", "items": {"type": "integer"}, "maxItems": 10**9})),
    "an enum of 1300": (SCHEMA, json.dumps({"enum": [f"item{index}" for index in range(1300)]})),
    "references that double 100 times": (SCHEMA, json.dumps({
        "$defs": {"d0": {"type": "object"}} | {
            f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}, {"$ref": f"#/$defs/d{i - 1}"}]} for i in range(1, 101)},
        "$ref": "#/$defs/d100"})),
    "170 choices that begin alike": (CHOICE, json.dumps(["a" * count for count in range(1, 171)])),
}  # fmt: skip
# Twenty letters are followed at once, and what comes after them, never.
DELAYED = (GRAMMAR, f'start: A\nA: /[b-y]{{20}}/ ("q" ({_bomb(59)}))?')


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    config = EngineConfig(demo.MODEL_DIR, max_model_len=8192, guide_compile_seconds=COMPILE_SECONDS)
    with driven_engine(config) as built:
        built.engine.runner.observe_logits = None
        yield built


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(demo.MODEL_DIR)


@dataclass
class Stream:
    """An unguided request that runs all the time, and the seconds between its tokens."""

    driver: Driver
    request_id: RequestId
    gaps: list[float] = field(default_factory=list)

    def run_until_ended(self, request_ids: list[RequestId]) -> float:
        """Step until the requests have ended; returns the seconds that it took."""
        started = last = time.perf_counter()
        count = len(self.driver.outcomes[self.request_id].tokens)
        while not all(self.driver.outcomes[request_id].ended for request_id in request_ids):
            self.driver.step()
            tokens = len(self.driver.outcomes[self.request_id].tokens)
            if tokens > count:
                now = time.perf_counter()
                self.gaps.append(now - last)
                last, count = now, tokens
            assert time.perf_counter() - started < 30
        return time.perf_counter() - started


@pytest.fixture
def stream(driver: Driver, tokenizer: Tokenizer) -> Iterator[Stream]:
    request_id = driver.add(tokenizer.encode("Once"), max_new_tokens=8000)
    driver.step()
    yield Stream(driver, request_id)
    driver.cancel(request_id)
    driver.run()
    assert driver.engine.guides.num_open == 0


def _add(driver: Driver, tokenizer: Tokenizer, guide: tuple[GuideKind, str], **params: float) -> RequestId:
    sampling = SamplingParams(guide=GuideSpec(*guide), **{"max_new_tokens": 8, **params})  # type: ignore[arg-type]
    return driver.add(tokenizer.encode("Anna"), params=sampling)


def test_explosive_guides_are_refused_in_bounded_time_while_others_stream_on(
    driver: Driver, tokenizer: Tokenizer, stream: Stream, record_number: RecordNumber
) -> None:
    seconds = {}
    for name, guide in REFUSED.items():
        request_id = _add(driver, tokenizer, guide)
        seconds[name] = stream.run_until_ended([request_id])
        failure = driver.outcomes[request_id].failure
        assert isinstance(failure, RequestFailed), name
        assert failure.reason in ("GUIDE_TOO_COMPLEX", "GUIDE_INVALID"), (name, failure)
        assert failure.kind in (ErrorKind.INVALID_ARGUMENT, ErrorKind.RESOURCE_EXHAUSTED), (name, failure)
        record_number(f"explosive guides: seconds to refuse {name}", seconds[name], at_most=COMPILE_SECONDS + 2)
        again = stream.run_until_ended([_add(driver, tokenizer, guide)])
        assert failure.kind is ErrorKind.RESOURCE_EXHAUSTED or again < 0.2, name  # a verdict is remembered
    record_number("explosive guides: median ms between tokens of a stream", 1e3 * statistics.median(stream.gaps))
    record_number("explosive guides: longest ms between tokens of a stream", 1e3 * max(stream.gaps), at_most=400)


def test_a_guide_at_the_border_is_followed_or_refused_in_bounded_time(
    driver: Driver, tokenizer: Tokenizer, stream: Stream, record_number: RecordNumber
) -> None:
    request_id = _add(driver, tokenizer, BORDERLINE)
    seconds = stream.run_until_ended([request_id])
    failure = driver.outcomes[request_id].failure
    assert failure is None or failure.reason == "GUIDE_TOO_COMPLEX"
    record_number("explosive guides: seconds for one at the border", seconds, at_most=2 * COMPILE_SECONDS + 2)


def test_guides_that_only_look_explosive_are_followed(
    driver: Driver, tokenizer: Tokenizer, stream: Stream, record_number: RecordNumber
) -> None:
    request_ids = {name: _add(driver, tokenizer, guide) for name, guide in HARMLESS.items()}
    seconds = stream.run_until_ended(list(request_ids.values()))
    for name, request_id in request_ids.items():
        outcome = driver.outcomes[request_id]
        assert outcome.finish_reason in (FinishReason.EOS, FinishReason.MAX_NEW_TOKENS), (name, outcome.failure)
    record_number("explosive guides: seconds for all that only look so", seconds, at_most=10)
    record_number("explosive guides: longest ms between tokens beside those", 1e3 * max(stream.gaps), at_most=400)


def test_a_guide_that_explodes_later_ends_its_own_request_alone(
    driver: Driver, tokenizer: Tokenizer, stream: Stream, record_number: RecordNumber
) -> None:
    neighbour = (REGEX, "[a-z]{100,120}!")
    expected = _add(driver, tokenizer, neighbour, max_new_tokens=200, temperature=1.0)
    stream.run_until_ended([expected])
    others = [_add(driver, tokenizer, neighbour, max_new_tokens=200, temperature=1.0) for _ in range(3)]
    bombs = [_add(driver, tokenizer, DELAYED, max_new_tokens=200, temperature=1.0, seed=seed) for seed in range(4)]
    seconds = stream.run_until_ended(others + bombs)
    assert {tuple(driver.outcomes[other].tokens) for other in others} == {tuple(driver.outcomes[expected].tokens)}
    failures = [driver.outcomes[bomb].failure for bomb in bombs if driver.outcomes[bomb].failure]
    assert failures
    assert {(failure.kind, failure.reason) for failure in failures} == {
        (ErrorKind.RESOURCE_EXHAUSTED, "GUIDE_TOO_COMPLEX")
    }
    record_number("explosive guides: seconds until a late one has ended, and all others", seconds, at_most=15)
    record_number("explosive guides: longest ms between tokens beside a late one", 1e3 * max(stream.gaps), at_most=400)


def test_the_engine_closes_at_once_though_a_guide_is_being_compiled(tokenizer: Tokenizer) -> None:
    config = EngineConfig(demo.MODEL_DIR, max_model_len=128, guide_compile_seconds=60.0)
    with driven_engine(config) as driver:
        _add(driver, tokenizer, REFUSED["an intersection of 600 patterns"])
        driver.step()
        time.sleep(0.5)
        started = time.perf_counter()
    assert time.perf_counter() - started < 2
