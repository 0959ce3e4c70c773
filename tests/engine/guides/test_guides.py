"""Guided requests through the engine: every output follows its guide, whatever else is in the batch."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from loaders.tokenizer import Tokenizer
from runtime import demo
from runtime.config import EngineConfig
from runtime.engine.messages import FinishReason, RequestId
from runtime.engine.sampling_params import GuideKind, GuideSpec, SamplingParams
from runtime.errors import ErrorKind
from tests.conftest import RecordNumber
from tests.engine.guides import generated
from tests.oracle.base_models import Oracle
from tests.oracle.driver import Driver, Outcome, driven_engine
from tests.oracle.shapes import V3, Shape

NUM_SCHEMAS, NUM_REGEXES = 120, 80
PROMPTS = ("Anna lives in", "2024-03-05 mail server", "The number 412305 is", "{", "张三")
TRICKY_CHOICES = ["a", "ab", "abc", 'say "hi"', "a\\b", "\\", "two\nlines", "tab\t", "é", "漢字", "😀", "e\u0301", "//",
                  "|"]  # fmt: skip
RECORD = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"enum": [1, 2, 3]}},
          "required": ["name", "n"], "additionalProperties": False}  # fmt: skip
SPECS = (
    GuideSpec(GuideKind.JSON_SCHEMA, json.dumps(RECORD)),
    GuideSpec(GuideKind.REGEX, "[a-z]{3,30}(, [a-z]{2,9}){0,3}"),
    GuideSpec(GuideKind.CHOICE, json.dumps(TRICKY_CHOICES)),
    GuideSpec(GuideKind.GRAMMAR, 'start: "(" (start | /[0-9]{1,3}/) ")"'),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(demo.MODEL_DIR)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    config = EngineConfig(
        demo.MODEL_DIR, dtype="float32", max_model_len=2048, kv_cache_tokens=2**15, max_batch_size=48
    )  # fmt: skip
    with driven_engine(config) as built:
        built.engine.runner.observe_logits = None  # the logits of all tokens would take gigabytes
        yield built
        assert built.engine.guides.num_open == 0


@dataclass
class Guided:
    """One request and the text that answered it."""

    spec: GuideSpec
    request_id: RequestId
    outcome: Outcome
    text: str = ""


def _add(driver: Driver, prompt: list[int], params: SamplingParams) -> Guided:
    assert params.guide is not None
    request_id = driver.add(prompt, params=params)
    return Guided(params.guide, request_id, driver.outcomes[request_id])


def _params(spec: GuideSpec, seed: int, *, sampled: bool, limit: int = 1000) -> SamplingParams:
    """The length penalty makes an end likelier with each token where the guide allows one: all texts come to it."""
    return SamplingParams(max_new_tokens=limit, guide=spec, temperature=1.0 if sampled else 0.0, seed=seed,
                          length_penalty_start=20, length_penalty_factor=2.0)  # fmt: skip


def _distinct(kind: GuideKind, generate: Callable[[int], str], count: int) -> list[GuideSpec]:
    sources = dict.fromkeys(generate(seed) for seed in range(2 * count))
    return [GuideSpec(kind, source) for source in itertools.islice(sources, count)]


def _is_valid(item: Guided) -> bool:
    if item.spec.kind is GuideKind.REGEX:
        return re.fullmatch(item.spec.source, item.text) is not None
    if item.spec.kind is GuideKind.CHOICE:
        return item.text in json.loads(item.spec.source)
    if item.spec.kind is GuideKind.GRAMMAR:
        return re.fullmatch(r"\(+\d{1,3}\)+", item.text) is not None and item.text.count("(") == item.text.count(")")
    schema = json.loads(item.spec.source)
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    try:
        checker.validate(json.loads(item.text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def test_two_hundred_generated_guides_give_valid_texts_only(
    driver: Driver, tokenizer: Tokenizer, record_number: RecordNumber
) -> None:
    specs = _distinct(GuideKind.JSON_SCHEMA, lambda seed: json.dumps(generated.json_schema(seed)), NUM_SCHEMAS)
    specs += _distinct(GuideKind.REGEX, generated.regex, NUM_REGEXES)
    requests, unguided = [], []
    for seed, spec in enumerate(specs):
        prompt = tokenizer.encode(PROMPTS[seed % len(PROMPTS)])
        requests += [_add(driver, prompt, _params(spec, seed, sampled=sampled)) for sampled in (False, True)]
        if seed % 4 == 0:
            unguided.append(driver.outcomes[driver.add(prompt, max_new_tokens=40)])
    driver.run(timeout_seconds=240)
    for item in requests:
        item.text = tokenizer.decode(item.outcome.tokens)
    invalid = [item for item in requests if item.outcome.finish_reason is not FinishReason.EOS or not _is_valid(item)]
    assert not invalid
    assert all(len(outcome.tokens) == 40 for outcome in unguided)
    record_number("guides: different schemas and regular expressions", len(set(specs)), at_least=200)
    record_number("guides: outputs, greedy and sampled", len(requests), at_least=400)
    record_number("guides: outputs that are invalid or cut off", len(invalid), at_most=0)
    record_number("guides: different outputs", len({item.text for item in requests}), at_least=250)
    record_number("guides: longest output in tokens", max(len(item.outcome.tokens) for item in requests))


def test_choices_and_grammars_are_followed_at_any_temperature(
    driver: Driver, tokenizer: Tokenizer, record_number: RecordNumber
) -> None:
    prompt = tokenizer.encode("One of:")
    items = [
        _add(driver, prompt, SamplingParams(max_new_tokens=400, guide=spec, temperature=temperature, seed=seed,
                                            length_penalty_factor=2.0))
        for spec in SPECS[2:] for seed in range(40) for temperature in (0.7, 5.0)
    ]  # fmt: skip
    driver.run()
    for item in items:
        item.text = tokenizer.decode(item.outcome.tokens)
    assert [item for item in items if not _is_valid(item)] == []
    seen = {item.text for item in items if item.spec.kind is GuideKind.CHOICE}
    record_number("guides: choices that were drawn, of 14", len(seen), at_least=8)


def test_unguided_neighbours_keep_every_token_and_guided_requests_are_as_alone(
    driver: Driver, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(text) for text in PROMPTS]

    def add_plain() -> list[Outcome]:
        params = [SamplingParams(max_new_tokens=30, temperature=seed % 2, seed=seed) for seed in range(5)]
        return [driver.outcomes[driver.add(prompt, params=item)]
                for prompt, item in zip(prompts, params, strict=True)]  # fmt: skip

    def add_guided(spec: GuideSpec) -> Outcome:
        return _add(driver, prompts[0], _params(spec, 3, sampled=True)).outcome

    alone = add_plain()
    driver.run()
    guided_alone = []
    for spec in SPECS:
        guided_alone.append(add_guided(spec))
        driver.run()
    together, guided_together = add_plain(), [add_guided(spec) for spec in SPECS]
    driver.run()
    assert [outcome.tokens for outcome in together] == [outcome.tokens for outcome in alone]
    assert [outcome.tokens for outcome in guided_together] == [outcome.tokens for outcome in guided_alone]


def test_a_guided_request_goes_on_rightly_after_it_was_preempted(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Anna")
    texts = {}
    for kv_tokens in (4096, 64):
        config = EngineConfig(demo.MODEL_DIR, dtype="float32", max_model_len=64, kv_cache_tokens=kv_tokens,
                              kv_block_tokens=4, max_batch_size=6)  # fmt: skip
        with driven_engine(config) as driver:
            items = [_add(driver, prompt, _params(spec, seed, sampled=True, limit=40))
                     for seed, spec in enumerate(SPECS + SPECS)]  # fmt: skip
            driver.run()
            texts[kv_tokens] = [item.outcome.tokens for item in items]
            assert (driver.stats.preemptions > 0) == (kv_tokens == 64)
            assert driver.stats.kv_tokens_used == 0 and driver.engine.guides.num_open == 0
    assert texts[4096] == texts[64]


def test_a_lost_process_is_replaced_and_the_texts_are_the_same(driver: Driver, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Anna")
    items = [_add(driver, prompt, _params(spec, 9, sampled=True)) for spec in SPECS]
    driver.run()
    again = [_add(driver, prompt, _params(spec, 9, sampled=True)) for spec in SPECS]
    for _ in range(4):
        _step_until(driver, lambda: all(_has_mask(driver, item) for item in again))
        os.kill(driver.engine.guides._follow_lane._process._child.pid, signal.SIGKILL)
        driver.step()
    driver.run()
    assert [item.outcome.tokens for item in again] == [item.outcome.tokens for item in items]
    assert driver.engine.guides._follow_lane._process.num_starts >= 2


def _has_mask(driver: Driver, item: Guided) -> bool:
    sequence = driver.engine.scheduler.find(item.request_id)
    return sequence is None or sequence.guide.is_ready


def _step_until(driver: Driver, done: Callable[[], bool]) -> None:
    while True:
        driver.engine.guides.take_answers()
        if done():
            return
        driver.engine.wait_for_work(0.01)
        driver.step()


def test_least_tokens_do_not_keep_a_complete_text_from_its_end(driver: Driver, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_new_tokens=50, min_new_tokens=20, guide=GuideSpec(GuideKind.REGEX, "x{3}|y{30}z*"))
    items = [_add(driver, tokenizer.encode(prompt), params) for prompt in PROMPTS]
    driver.run()
    texts = {tokenizer.decode(item.outcome.tokens) for item in items}
    assert texts <= {"xxx", *("y" * 30 + "z" * count for count in range(21))}


def test_a_guide_that_cannot_be_compiled_fails_its_request_alone(driver: Driver, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Anna")
    bad = [_add(driver, prompt, _params(GuideSpec(GuideKind.REGEX, source), 0, sampled=False))
           for source in ("(a", "(a", "[^\\s\\S]", "x" * 16_385)]  # fmt: skip
    good = _add(driver, prompt, _params(GuideSpec(GuideKind.REGEX, "(a)"), 0, sampled=False))
    driver.run()
    assert tokenizer.decode(good.outcome.tokens) == "a"
    failures = [item.outcome.failure for item in bad]
    assert [(failure.kind, failure.reason, failure.field) for failure in failures if failure] == [
        (ErrorKind.INVALID_ARGUMENT, reason, "params.decoding.regex")
        for reason in ("GUIDE_INVALID", "GUIDE_INVALID", "GUIDE_INVALID", "GUIDE_TOO_COMPLEX")
    ]


def test_cancelled_requests_leave_nothing_at_any_moment(driver: Driver, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Anna")
    for num_steps in (0, 1, 2, 5, 20):
        specs = [*SPECS, GuideSpec(GuideKind.REGEX, f"new{num_steps}[a-z]{{40}}"), GuideSpec(GuideKind.REGEX, "(bad")]
        items = [_add(driver, prompt, _params(spec, 1, sampled=True)) for spec in specs]
        for _ in range(num_steps):
            driver.engine.wait_for_work(0.01)
            driver.step()
        for item in items:
            driver.cancel(item.request_id)
        driver.step()
        driver.run()
        stats = driver.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
        assert driver.engine.guides.num_open == 0 and not driver.engine.guides._unchecked


def test_the_cache_is_bounded_and_the_end_of_the_engine_ends_all(tokenizer: Tokenizer) -> None:
    config = EngineConfig(demo.MODEL_DIR, max_model_len=128, guide_cache_entries=2)
    with driven_engine(config) as driver:
        for count in range(5):
            spec = GuideSpec(GuideKind.REGEX, f"[ab]{{{count + 1}}}")
            items = [_add(driver, tokenizer.encode("x"), _params(spec, 1, sampled=False)) for _ in range(3)]
            driver.run()
            assert all(len(tokenizer.decode(item.outcome.tokens)) == count + 1 for item in items)
        guides = driver.engine.guides
        assert len(guides._verdicts) == 2
        children = [lane._process._child for lane in (guides._check_lane, guides._follow_lane)]
        _add(driver, tokenizer.encode("x"), _params(GuideSpec(GuideKind.REGEX, "[cd]{9}"), 1, sampled=False))
        driver.step()
    assert all(child.wait(5) is not None for child in children)


def test_a_model_without_a_tokenizer_refuses_guides_and_serves_on(oracle: Callable[[Shape], Oracle]) -> None:
    path: Path = oracle(V3).path
    assert not (path / "tokenizer.json").exists()
    with driven_engine(EngineConfig(path, dtype="float32", max_model_len=64, kv_cache_tokens=256)) as driver:
        item = _add(driver, [5, 6, 7], _params(GuideSpec(GuideKind.REGEX, "a"), 0, sampled=False, limit=10))
        plain = driver.generate([5, 6, 7], max_new_tokens=4)
        driver.run()
        assert len(plain.tokens) == 4 and item.outcome.failure is not None
        assert item.outcome.failure.kind is ErrorKind.FAILED_PRECONDITION
        assert item.outcome.failure.reason == "GUIDES_UNAVAILABLE" and "tokenizer.json" in item.outcome.failure.message
