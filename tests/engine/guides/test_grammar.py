"""What is refused as a guide, with which words; and that what is taken is what the client wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.engine.guides.protocol import Allowed, Refused
from runtime.engine.sampling_params import GuideKind
from runtime.errors import Precondition
from tests.engine.guides.follower import Follower, following

SCHEMA, REGEX, CHOICE, GRAMMAR = GuideKind.JSON_SCHEMA, GuideKind.REGEX, GuideKind.CHOICE, GuideKind.GRAMMAR
REFUSED = [
    (SCHEMA, "", "not valid JSON"),
    (SCHEMA, '{"type":', "not valid JSON"),
    (SCHEMA, '{"minimum": NaN}', "NaN is not a JSON value"),
    (SCHEMA, '{"const": "\\ud800"}', "not valid JSON"),
    (SCHEMA, "true", "must be an object, not a boolean"),
    (SCHEMA, "[]", "must be an object, not an array"),
    (SCHEMA, "3", "must be an object, not a number"),
    (SCHEMA, '{"type": "strin"}', "Invalid type: strin"),
    (SCHEMA, '{"type": 3}', "type must be a string"),
    (SCHEMA, '{"not": {}}', 'Unimplemented keys: ["not"]'),
    (SCHEMA, '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    (SCHEMA, '{"type": "array", "contains": {"type": "null"}}', "contains"),
    (SCHEMA, '{"if": {}, "then": {}}', "Unimplemented keys"),
    (SCHEMA, '{"oneOf": [{"type": "string"}, {"minLength": 3}]}', "oneOf constraints are not supported"),
    (SCHEMA, '{"type": "string", "format": "credit-card"}', "Unknown format: credit-card"),
    (SCHEMA, '{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
    (SCHEMA, '{"minimum": 5, "maximum": 1, "type": "integer"}', "minimum (5) is greater than maximum (1)"),
    (SCHEMA, '{"$ref": "#/$defs/x"}', "does not exist"),
    (SCHEMA, '{"$ref": "http://localhost:1/x.json"}', "does not fetch"),
    (SCHEMA, '{"$ref": "file:///etc/passwd"}', "does not fetch"),
    (SCHEMA, '{"$ref": "#"}', "no text can follow it"),
    (SCHEMA, '{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance is not taken"),
    (SCHEMA, '{"const": 1e999}', "number out of range"),
    (SCHEMA, '{}}], "max_tokens": 1, "grammars": [{"json_schema": {}', "not valid JSON"),
    (REGEX, "(a", "unclosed group"),
    (REGEX, "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
    (REGEX, r"(a)\1", "backreferences are not supported"),
    (REGEX, r"\bfoo\b", "lookarounds not supported"),
    (REGEX, "a\\", "ends in a single backslash"),
    (REGEX, r"[^\s\S]", "no text can follow it"),
    (CHOICE, "[]", "must be a list of strings"),
    (CHOICE, '["a", 1]', "must be a list of strings"),
    (CHOICE, '"a"', "must be a list of strings"),
    (CHOICE, "a", "not valid JSON"),
    (CHOICE, '["\\ud800"]', "not valid JSON"),
    (GRAMMAR, "", "neither Lark nor GBNF"),
    (GRAMMAR, "hello", "neither Lark nor GBNF"),
    (GRAMMAR, "start: foo", "unknown name"),
    (GRAMMAR, "start: start", "no text can follow it"),
    (GRAMMAR, 'start: "a', "lexer error"),
    (GRAMMAR, "start: @other", "unknown grammar"),
    (GRAMMAR, 'start: <|nothing|> "a"', "unknown special token"),
    (GRAMMAR, "%import .secret.file\nstart: file", "Unknown common regex"),
    (GRAMMAR, "start: a\na[temperature=0.5]: /b+/", "'temperature' is not taken"),
    (GRAMMAR, 'start: a\na[capture, stop="x"]: /b+/', "'stop' is not taken"),
    (GRAMMAR, '{"grammars": [{"json_schema": {}}]}', "neither Lark nor GBNF"),
    (GRAMMAR, 'root ::= "a', "Unexpected end of input"),
    (GRAMMAR, 'root ::= "\\', "neither Lark nor GBNF"),
]
TAKEN = [
    (SCHEMA, '{"type": "object"}'),
    (SCHEMA, '{"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "type": "string"}'),
    (SCHEMA, '{"type": "string", "flavour": "unknown keywords say nothing about validity"}'),
    (REGEX, r"^\d{3}-[^a-z/]+/(yes|no)$"),
    (REGEX, "a\\\\"),
    (REGEX, ""),
    (CHOICE, '[""]'),
    (GRAMMAR, 'start: "a" b*\nb: /[0-9]+/ | %json {"type": "object"}\n%ignore " "'),
    (GRAMMAR, 'start: a "b"\na[max_tokens=3]: /.*/'),
    (GRAMMAR, 'root ::= "a" item* # comment\nitem ::= [0-9]+ | "[stop]" | ("x" | "y"){2,3}'),
    (GRAMMAR, 'start: "the temperature = 3 [stop=1]"'),
]


@pytest.fixture(scope="module")
def follower() -> Iterator[Follower]:
    with following() as built:
        yield built


@pytest.mark.parametrize(("kind", "source", "words"), REFUSED)
def test_a_guide_that_cannot_be_followed_is_refused_in_words(
    follower: Follower, kind: GuideKind, source: str, words: str
) -> None:
    answer = follower.check(kind, source)
    assert isinstance(answer, Refused), answer
    assert answer.reason == "GUIDE_INVALID" and words in answer.message, answer
    assert len(answer.message) <= 400 and "limits." not in answer.message
    assert follower.process.num_starts == 1


@pytest.mark.parametrize(("kind", "source"), TAKEN)
def test_a_guide_that_can_be_followed_is_taken(follower: Follower, kind: GuideKind, source: str) -> None:
    assert follower.check(kind, source) == Allowed()


def test_a_process_with_too_little_memory_for_a_guide_ends_and_says_so() -> None:
    """250 patterns at once take the library 700 MB."""
    patterns = [{"type": "string", "pattern": f"{chr(97 + i % 26)}.{{{i}}}{chr(98 + i % 24)}"} for i in range(250)]
    with following(compile_seconds=20.0, max_memory_bytes=2**28) as small:
        with pytest.raises(Exception, match="too much memory"):
            small.check(SCHEMA, json.dumps({"allOf": patterns}))
        assert small.check(REGEX, "a+") == Allowed()
        assert small.process.num_starts == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("{", "does not serve"), ('{"version": "1.0"}', "does not serve"),
     ("[]", "does not serve")],
)  # fmt: skip
def test_a_model_without_a_usable_tokenizer_has_no_guides(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with following(tokenizer=str(path)) as broken:
        for _ in range(2):
            with pytest.raises(Precondition, match=words):
                broken.check(REGEX, "a")
        assert broken.process.num_starts == 1


def test_padding_and_truncation_of_a_tokenizer_do_not_matter(tmp_path: Path) -> None:
    with following() as plain:
        settings = json.loads(Path(plain.process._setup.tokenizer).read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(settings))
    with following(tokenizer=str(path)) as follower:
        assert follower.check(CHOICE, json.dumps(["a text of more than two tokens"])) == Allowed()
