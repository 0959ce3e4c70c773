"""JSON schemas and regular expressions drawn by a seed, with texts short enough that a weak model gets to their end."""

from __future__ import annotations

import random
import string
from typing import Any

KEYS = ("name", "id", "a b", "é", "日本", 'q"uote', "back\\slash", "x/y", "tab\t", "😀", "", "Z_9", "$ref", "if")
WORDS = ("red", "green", "blue", 'say "hi"', "a\\b", "two\nlines", "naïve", "漢字", "🙂🙃", "", " ", "null")
STRING_PATTERNS = (
    r"^[a-z]{1,8}$", r"^[A-Z][a-z]{2,6}( [A-Z][a-z]{2,6}){0,2}$", r"^\d{3}-\d{4}$", r"^(yes|no|maybe)$",
    r"^#[0-9a-f]{6}$", r"^[^a-z\"\\]{2,5}$", r"^v\d{1,2}(\.\d{1,2}){0,2}$", r"^[一-龥]{1,4}$",
)  # fmt: skip


def json_schema(seed: int) -> dict[str, Any]:
    """An object or an array in most cases, a single value in the others."""
    rng = random.Random(seed)
    make = rng.choice((_object, _object, _object, _array, _array, _with_refs, _all_of, _value))
    return make(rng, 3)


def regex(seed: int) -> str:
    """A regular expression that Python and Rust read alike; only its end may repeat without a bound.

    Left out are backslash-d, -w and negated classes of them: the two differ in the version of Unicode.
    """
    rng = random.Random(seed)
    text = _alternatives(rng, 2)
    if rng.random() < 0.25:
        text = f"(?:{text}){_char_class(rng)}{rng.choice('*+')}"
    if rng.random() < 0.2:
        text = f"^(?:{text})$"
    return f"(?i){text}" if rng.random() < 0.15 else text


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves = (_string, _string, _integer, _number, _constant, _enum)
    nested = (_object, _array, _any_of, _one_of) if depth > 0 else ()
    return rng.choice(leaves + nested)(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.12:
        values = _value(rng, 0)
        return {"type": "object", "patternProperties": {"^[a-z]{1,6}$": values}, "additionalProperties": False,
                "maxProperties": rng.randint(0, 3)}  # fmt: skip
    keys = rng.sample(KEYS, rng.randint(0, 4))
    properties = {key: _value(rng, depth - 1) for key in keys}
    required = [key for key in keys if rng.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.25:
        items = [_value(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _one_of(rng: random.Random, depth: int) -> dict[str, Any]:
    """Alternatives that exclude each other by a constant; the library refuses others."""
    kinds = rng.sample(("circle", "square", "line"), 2)
    parts = [
        {"type": "object", "properties": {"kind": {"const": kind}, "size": _integer(rng, 0)},
         "required": ["kind", "size"], "additionalProperties": False}
        for kind in kinds
    ]  # fmt: skip
    return {"oneOf": parts}


def _all_of(rng: random.Random, depth: int) -> dict[str, Any]:
    first, both = {"n": _integer(rng, 0)}, {"n": True, "s": _string(rng, 0)}
    return {
        "allOf": [
            {"type": "object", "properties": first, "required": ["n"]},
            {"type": "object", "properties": both, "required": ["s"], "additionalProperties": False},
        ]
    }


def _with_refs(rng: random.Random, depth: int) -> dict[str, Any]:
    properties = {"first": {"$ref": "#/$defs/part"}, "rest": {"type": "array", "items": {"$ref": "#/$defs/part"},
                                                             "maxItems": 2}}  # fmt: skip
    return {"$defs": {"part": _value(rng, 1)}, "type": "object", "properties": properties, "required": ["first"],
            "additionalProperties": False}  # fmt: skip


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    draw = rng.random()
    if draw < 0.4:
        return {"type": "string", "pattern": rng.choice(STRING_PATTERNS)}
    if draw < 0.55:
        return {"type": "string", "format": rng.choice(("date", "ipv4", "uuid"))}
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice((0, 1, -5, -1234, 10**6))
    high = low + rng.choice((0, 7, 100, 10**5))
    bounds = {"exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1} if rng.random() < 0.3 else {
        "minimum": low, "maximum": high}  # fmt: skip
    return {"type": "integer", **bounds, **({"multipleOf": 1} if rng.random() < 0.1 else {})}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    """Quarters: without `multipleOf`, digits may follow for ever."""
    low = rng.choice((0, -3, 10.5, -0.25))
    return {"type": "number", "minimum": low, "maximum": low + rng.choice((1, 20, 500)), "multipleOf": 0.25}


def _constant(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]},
                       {"const": rng.choice(WORDS)}, {"const": {"a": [1, None, {"b": "c"}]}},
                       {"const": 3.5}))  # fmt: skip


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[object] = list(rng.sample(WORDS, rng.randint(1, 6)))
    return {"enum": [*values, *rng.sample((1, -2.5, None, True, [1, 2], {"k": "v"}), rng.randint(0, 3))]}


def _alternatives(rng: random.Random, depth: int) -> str:
    return "|".join(_sequence(rng, depth) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _sequence(rng: random.Random, depth: int) -> str:
    return "".join(_repeated(rng, depth) for _ in range(rng.randint(1, 4)))


def _repeated(rng: random.Random, depth: int) -> str:
    atom = _atom(rng, depth)
    draw = rng.random()
    if draw < 0.5:
        return atom
    if draw < 0.65:
        return atom + "?"
    low = rng.randint(0, 3)
    return atom + rng.choice((f"{{{low}}}", f"{{{low},{low + rng.randint(0, 4)}}}"))


def _atom(rng: random.Random, depth: int) -> str:
    draw = rng.random()
    if depth and draw < 0.25:
        opening = rng.choice(("(", "(?:", f"(?P<n{rng.randrange(10**9)}>"))
        return f"{opening}{_alternatives(rng, depth - 1)})"
    if draw < 0.55:
        return _char_class(rng)
    if draw < 0.65:
        return rng.choice((".", r"\s", "[^0-9]"))
    word = "".join(rng.choices(string.ascii_lowercase, k=3))
    return rng.choice(("a", "xyz"[rng.randrange(3)], "0", " ", "-", r"\.", r"\/", "/", r"\\", '"', "é", "漢", "😀",
                       r"\n", r"\t", word, r"\x41", r"\u00e9", r"\{", r"\+"))  # fmt: skip


def _char_class(rng: random.Random) -> str:
    return rng.choice(("[a-z]", "[A-Z0-9]", "[^a-z]", "[aeiou]", "[0-9a-fA-F]", "[一-龥]", "[0-9.]", "[^ -]", "[-+*]",
                       "[é-ü]", r"[\]\[]", "[ -~]"))  # fmt: skip
