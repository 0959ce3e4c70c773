"""From what a client wrote to a grammar of llguidance. Refuses what would not be followed to the letter."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from runtime.engine.sampling_params import GuideKind, GuideSpec

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Between the parts of a JSON text: one space, or a new line and its indentation. Without a bound, a weak model could
# write blanks for ever.
JSON_WHITESPACE = r" |\n[ \t]{0,16}"
_JSON_OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": JSON_WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
    "json_allow_general_unicode_escapes": False,
}
# Attributes of a Lark rule that change the sampling or hide text; llguidance's matcher would pass over them.
_UNUSED_ATTRIBUTE = re.compile(r"^[ \t]*[?!]?[\w-]+[ \t]*\[[^\]\n]*\b(temperature|stop)\b", re.MULTILINE)
# Every message of llguidance that speaks of a bound holds one of these.
_LIMIT_WORDS = (
    "too many", "Too many", "too big", "too large", "too complex", "too deeply", "maximum number", "recursion limit",
    "fuel", "precomputation", "Unable to determine", "Current row has",
)  # fmt: skip
NOTHING_FOLLOWS = "no text can follow it"
_MAX_MESSAGE = 300


class GuideError(Exception):
    """A guide that is not taken: `reason` is GUIDE_INVALID or GUIDE_TOO_COMPLEX."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def to_grammar(spec: GuideSpec) -> str:
    """The grammar of llguidance for a guide; raises GuideError for what is not of its kind."""
    match spec.kind:
        case GuideKind.JSON_SCHEMA:
            return _json_schema(spec.source)
        case GuideKind.REGEX:
            return _regex(spec.source)
        case GuideKind.CHOICE:
            return _choice(spec.source)
        case GuideKind.GRAMMAR:
            return _grammar(spec.source)


def library_error(message: str) -> GuideError:
    """What llguidance says of a grammar, cut to what a client can use."""
    is_limit = any(words in message for words in _LIMIT_WORDS)
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    told = NOTHING_FOLLOWS if told.startswith("NoExtension") else told.split("; either increase")[0]
    return GuideError("GUIDE_TOO_COMPLEX" if is_limit else "GUIDE_INVALID", shorten(told))


def shorten(message: str) -> str:
    """At most 300 characters, cut in the middle: the library's messages end with what is wrong."""
    if len(message) <= _MAX_MESSAGE:
        return message
    half = _MAX_MESSAGE // 2
    return f"{message[:half]} ... {message[-half:]}"


def _json_schema(source: str) -> str:
    schema = _parse_json(source)
    if not isinstance(schema, dict):
        raise GuideError("GUIDE_INVALID", f"a JSON schema must be an object, not {_json_type(schema)}")
    if "x-guidance" in schema:
        raise GuideError("GUIDE_INVALID", "x-guidance is not taken: the server sets the options of the compiler")
    try:
        return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)
    except ValueError as cause:
        raise library_error(str(cause)) from cause


def _regex(source: str) -> str:
    """The whole text must match; the syntax is that of the Rust crate `regex`, without look-around."""
    if (len(source) - len(source.rstrip("\\"))) % 2:
        raise GuideError("GUIDE_INVALID", "the regular expression ends in a single backslash")
    return LLMatcher.grammar_from_regex(source)


def _choice(source: str) -> str:
    choices = _parse_json(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise GuideError("GUIDE_INVALID", "choices must be a list of strings, at least one")
    # One terminal and not one for each choice, so that the lexer cannot prefer one that begins like another.
    return _lark("start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices))


def _grammar(source: str) -> str:
    """Lark's syntax, or GBNF of llama.cpp: whatever has no `start:` rule."""
    try:
        lark = any_to_lark(source)
    except Exception as cause:  # the converter raises plain ones, and IndexError or RecursionError of its own
        raise GuideError("GUIDE_INVALID", shorten(f"neither Lark nor GBNF: {cause}")) from cause
    if unused := _UNUSED_ATTRIBUTE.search(lark):
        raise GuideError("GUIDE_INVALID", f"the rule attribute {unused[1]!r} is not taken")
    return _lark(lark)


def _lark(source: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": source}]})


def _parse_json(source: str) -> object:
    try:
        value: object = json.loads(source, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:  # ValueError also for lone surrogates and for huge numbers
        raise GuideError("GUIDE_INVALID", shorten(f"not valid JSON: {cause}")) from cause
    return value


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _json_type(value: object) -> str:
    names = {bool: "a boolean", str: "a string", list: "an array", type(None): "null"}
    return names.get(type(value), "a number")
