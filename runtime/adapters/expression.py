"""What `adapter_id` may say: NAME, NAME@GENERATION, or a weighted sum of them, `0.7*a+0.3*b@7`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from runtime.errors import InvalidRequest

MAX_PARTS = 8
MAX_CHARS = 1024
ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
ADAPTER_REFERENCE = re.compile(ADAPTER_ID.pattern + r"(@[1-9][0-9]{0,17})?")  # an id or alias, or one generation
# Decimal, so that weights are finite, add up exactly, and have one way in which they are written.
WEIGHT = re.compile(r"-?[0-9]{1,4}(\.[0-9]{1,6})?")
ONE = Decimal(1)
PLUS, TIMES = "+", "*"


@dataclass(frozen=True)
class Term:
    """One part of a sum as it was written."""

    weight: Decimal
    reference: str


def parse_expression(text: str, field: str = "adapter_id") -> tuple[Term, ...]:
    """The terms of a sum, or the only one; raises InvalidRequest, naming `field` and the part at fault.

    Parts are joined by `+`; a negative weight is written out, `a+-0.5*b`, since names may contain `-`.
    """
    if len(text) > MAX_CHARS:
        raise _invalid(field, f"{field} has {len(text)} characters; at most {MAX_CHARS} are allowed")
    parts = text.split(PLUS)
    if len(parts) > MAX_PARTS:
        raise _invalid(field, f"{field} is a sum of {len(parts)} adapters; at most {MAX_PARTS} are allowed")
    where = f"{field} {_shown(text)}"
    if len(parts) == 1:
        return (_parse_term(text, where, field),)
    return tuple(_parse_term(part, f"{where}, part {place}", field) for place, part in enumerate(parts, start=1))


def is_sum(text: str) -> bool:
    """Whether this names a weighted sum, and not one adapter as it is."""
    return PLUS in text or TIMES in text


def names(text: str, reference: str) -> bool:
    """Whether an expression, which has been checked, is this one or has it as a part."""
    return text == reference or reference in (part.rpartition(TIMES)[2] for part in text.split(PLUS))


def weight_text(weight: Decimal) -> str:
    """The one way in which a weight is written: no exponent, no zeros at its end."""
    return f"{weight.normalize():f}"


def term_text(weight: Decimal, reference: str) -> str:
    """One part of a sum; a weight of 1 is left out."""
    return reference if weight == ONE else f"{weight_text(weight)}{TIMES}{reference}"


def _parse_term(text: str, where: str, field: str) -> Term:
    weight, sign, reference = text.rpartition(TIMES)
    if sign and not WEIGHT.fullmatch(weight):
        message = f"{where}: {_shown(weight)} is not a weight, a decimal number such as 0.7 or -0.5 before '*'"
        raise _invalid(field, f"{message}; parts are joined by '+'")
    if not ADAPTER_REFERENCE.fullmatch(reference):
        message = f"{where}: {_shown(reference)} must match {ADAPTER_REFERENCE.pattern}: NAME or NAME@GENERATION"
        raise _invalid(field, f"{message}, or a sum such as 0.7*NAME+0.3*NAME")
    number = Decimal(weight) if sign else ONE
    if not number:
        raise _invalid(field, f"{where}: the weight of {reference!r} is 0: leave this part out")
    return Term(number, reference)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="ADAPTER_ID_INVALID", field=field)
