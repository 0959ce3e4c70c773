"""The masks of a guide process: which tokens may come next, against software that decides it text by text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex

from loaders.tokenizer import Tokenizer
from runtime import demo
from runtime.engine.guides.protocol import AdvanceGuide, Refused
from runtime.engine.guides.store import make_setup
from runtime.engine.sampling_params import GuideKind, GuideSpec
from tests.conftest import RecordNumber
from tests.engine.guides.follower import DEMO_SETUP, Follower, following, write_tokenizer

EOS = 0
TOKENS = [*'abcdxyz0123-"\\{}[],: \n', "ab", "abc", "bc", "12", "123", "-1", "a-", '"}', '": ', "  ", "bcd", "aa",
          "aaaa", "01", "cd", "dcb", "é", "xy"]  # fmt: skip
PATTERNS = (
    "[ab]{1,3}-?", "abc", "a|abc|abcd", "(ab|a)c?d*", "[0-3]{2}[a-d]*", "(12)?3?[^0-9]{0,2}", "a+b+c+", "(?:a|b)*abb",
    "-?(0|[1-3][0-3]*)(,[0-3]+)?", "", "a?", "(a?){5}", '"[^"\\n]*"', "x(y|z){2,}", "[a-d]{0,4}é?", "(ab|cd)*(abc|bcd)",
    "[^a]*a", "(?i)ABC?", " *:", "(a{2}){1,3}",
)  # fmt: skip
# Every text of each schema, as a regular expression.
SCHEMAS = (
    ({"type": "integer", "minimum": 1, "maximum": 12}, r"1[0-2]?|[2-9]"),
    ({"enum": ["a", "ab", 1, True]}, r'"a"|"ab"|1|true'),
    ({"type": "string", "pattern": "^a[bc]{1,2}$"}, r'"a[bc]{1,2}"'),
    ({"type": "array", "items": {"const": 1}, "maxItems": 2}, r"\[W(1W(,W1W)?)?\]"),
    ({"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False}, r'\{W("a"W:W1W)?\}'),
)
WHITESPACE = r"(?: |\n[ \t]{0,16})?"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Follower, dict[int, str]]]:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    ids = write_tokenizer(path, TOKENS)
    setup = make_setup(str(path), len(TOKENS) + 1, [EOS], cache_entries=8, compile_seconds=5.0)
    with following(setup) as follower:
        yield follower, {number: text for text, number in ids.items()}


def _expected(pattern: regex.Pattern[str], text: str, tokens: dict[int, str]) -> set[int]:
    """Brute force: a token may come if what it makes of the text is the beginning of a match."""
    may_come = {number for number, token in tokens.items() if pattern.fullmatch(text + token, partial=True)}
    return may_come | ({EOS} if pattern.fullmatch(text) else set())


def _is_forced(may_come: set[int], tokens: dict[int, str]) -> bool:
    """Whether only one character can come: there llguidance may ask for the token that the tokenizer would take."""
    return EOS not in may_come and len({tokens[number][0] for number in may_come}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_masks_equal_brute_force_on_a_small_vocabulary(
    small: tuple[Follower, dict[int, str]], record_number: RecordNumber, seed: int
) -> None:
    follower, tokens = small
    cases = [(GuideSpec(GuideKind.REGEX, source), source) for source in PATTERNS]
    cases += [(GuideSpec(GuideKind.JSON_SCHEMA, json.dumps(schema)), source.replace("W", WHITESPACE))
              for schema, source in SCHEMAS]  # fmt: skip
    num_equal = num_forced = 0
    rng = random.Random(seed)
    for spec, source in cases:
        pattern = regex.compile(source)
        text, allowed = "", follower.open(spec)
        for _ in range(12):
            expected = _expected(pattern, text, tokens)
            if allowed == expected:
                num_equal += 1
            else:
                assert _is_forced(expected, tokens) and len(allowed) == 1 and allowed < expected, (source, text)
                num_forced += 1
            choices = sorted(allowed - {EOS})
            if not choices:
                break
            token_id = rng.choice(choices)
            text, allowed = text + tokens[token_id], follower.advance(token_id)
    record_number(f"guides: masks equal to brute force, walk {seed}", num_equal, at_least=100)
    record_number(f"guides: masks with one token where only one text can come, walk {seed}", num_forced, at_most=60)


def test_choices_are_reached_whatever_is_in_them(small: tuple[Follower, dict[int, str]]) -> None:
    """Every choice, token by token as the tokenizer cuts it, and an end where it is complete and nowhere else."""
    choices = ["a", "ab", "abc", 'say "hi"', "a\\b", "\\", '"', "two\nlines", "\r\n", "tab\t", "\x00", "\x7f",
               "é", "漢字", "😀",
               "\U0001f469\u200d\U0001f467", "e\u0301", "\u2028", "\ufeff", "//", "#", "|", "~a", "%json {}",
               "<[1]>", "/a/i", "${x}", " ", "  ", "\\u0041", "'", "", "A" * 500]  # fmt: skip
    tokenizer = Tokenizer.from_dir(demo.MODEL_DIR)
    spec = GuideSpec(GuideKind.CHOICE, json.dumps(choices))
    with following() as follower:
        for choice in choices:
            token_ids = tokenizer.backend.encode(choice, add_special_tokens=False).ids
            allowed = follower.open(spec)
            for count, token_id in enumerate(token_ids):
                assert token_id in allowed, (choice, count)
                assert (1 in allowed) == (tokenizer.decode(token_ids[:count]) in choices), (choice, count)
                allowed = follower.advance(token_id)
            assert 1 in allowed, choice


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [('{"a":1,"b":[]}', True), ('{"a": 1, "b": [ ]}', True), ('{\n  "a": 1,\n  "b": []\n}', True),
     ('{\n\t"a": 1,\n\t"b": []\n}', True), ("{\n" + 16 * " " + '"a":1,"b":[]}', True),
     ("{\n" + 17 * " " + '"a":1,"b":[]}', False), ('{  "a":1,"b":[]}', False), ('{\n\n"a":1,"b":[]}', False),
     (' {"a":1,"b":[]}', False), ('{"a":1,"b":[]} ', False)],
)  # fmt: skip
def test_whitespace_of_json_is_free_but_bounded(text: str, is_allowed: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "maxItems": 0}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    seen = _follow_text(GuideSpec(GuideKind.JSON_SCHEMA, json.dumps(schema)), text)
    assert (seen == text) == is_allowed, seen


def _follow_text(spec: GuideSpec, text: str) -> str:
    """As much of the text as is allowed, byte by byte; all of it only if it may end there."""
    tokenizer = Tokenizer.from_dir(demo.MODEL_DIR)
    with following() as follower:
        allowed, seen = follower.open(spec), ""
        for character in text:
            (token_id,) = tokenizer.backend.encode(character, add_special_tokens=False).ids
            if token_id not in allowed:
                return seen
            seen, allowed = seen + character, follower.advance(token_id)
        return seen if 1 in allowed else seen + "..."


@pytest.mark.parametrize("source", ['start: <[1]> "a" | "b"', 'start: <[1000-1023]> "a" | <[1020]> "b" | "b"'])
def test_a_grammar_cannot_reach_an_end_in_the_middle_or_a_token_without_text(source: str) -> None:
    tokenizer = Tokenizer.from_dir(demo.MODEL_DIR)
    (b,) = tokenizer.backend.encode("b", add_special_tokens=False).ids
    known = len(tokenizer.backend.get_vocab())
    with following(vocab_size=2048) as follower:
        allowed = follower.open(GuideSpec(GuideKind.GRAMMAR, source.replace("1020", "2000")))
        assert b in allowed and 1 not in allowed and max(allowed) < known


def test_several_end_tokens_may_end_a_text_and_no_others_follow_it() -> None:
    with following(eos_token_ids=[1, 7]) as follower:
        allowed = follower.open(GuideSpec(GuideKind.REGEX, "[ab]"))
        assert 1 not in allowed and 7 not in allowed
        assert follower.advance(min(allowed)) == {1, 7}


def test_a_sequence_can_be_taken_up_in_the_middle_by_a_new_process() -> None:
    spec = GuideSpec(GuideKind.JSON_SCHEMA, json.dumps({"type": "object"}))
    tokenizer = Tokenizer.from_dir(demo.MODEL_DIR)
    token_ids = tokenizer.backend.encode('{"name": "Anna", "n": [1, {"x": nu', add_special_tokens=False).ids
    with following() as first, following() as second:
        first.open(spec)
        step_by_step = [first.advance(token_id) for token_id in token_ids][-1]
        assert second.open(spec, token_ids) == step_by_step


def test_a_matcher_that_fails_by_what_others_did_is_replaced_by_one_of_its_own() -> None:
    """Copies share the lexer's states, whose number is bounded: without a replacement, the second walk would fail."""
    spec = GuideSpec(GuideKind.REGEX, "((([a-z]{1,1000}){1,1000}){1,1000}){1,1000}")
    with following() as follower:
        lengths = []
        for _ in range(3):
            allowed, length = follower.open(spec), 0
            while True:
                (answer,) = follower.process.ask([AdvanceGuide(1, min(allowed - {1}))])
                if isinstance(answer, Refused):
                    break
                allowed, length = follower.ids(answer), length + 1
            assert answer.reason == "GUIDE_TOO_COMPLEX"
            lengths.append(length)
        assert lengths[0] >= 1 and len(set(lengths)) == 1


def test_an_ambiguous_grammar_ends_when_it_has_used_up_its_share_of_time(record_number: RecordNumber) -> None:
    spec = GuideSpec(GuideKind.GRAMMAR, 'start: s\ns: s s s s | s s s | s s | "a" | "aa" | ""')
    with following(DEMO_SETUP) as follower:
        allowed, length = follower.open(spec), 0
        while True:
            (answer,) = follower.process.ask([AdvanceGuide(1, max(allowed))])
            if isinstance(answer, Refused):
                break
            allowed, length = follower.ids(answer), length + 1
    assert answer.reason == "GUIDE_TOO_COMPLEX" and "following it has taken" in answer.message
    record_number("guides: tokens of an ambiguous grammar before its end", length, at_least=10)
