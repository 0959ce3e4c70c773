"""What `adapter_id` may say about several adapters, and what is said about what it may not."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.adapters.expression import MAX_PARTS, names, parse_expression, term_text
from runtime.errors import InvalidRequest

UNDERSTOOD = {
    "a": [("1", "a")],
    "a@3": [("1", "a@3")],
    "a+b": [("1", "a"), ("1", "b")],
    "0.7*a+0.3*b": [("0.7", "a"), ("0.3", "b")],
    "a@3+0.5*b": [("1", "a@3"), ("0.5", "b")],
    "-0.5*a": [("-0.5", "a")],
    "a+-0.5*b": [("1", "a"), ("-0.5", "b")],
    "support-v7+2*7b.x_y@12": [("1", "support-v7"), ("2", "7b.x_y@12")],
    "a+a": [("1", "a"), ("1", "a")],
    "9999.999999*a": [("9999.999999", "a")],
}
REFUSED = {
    "": "''",
    "a+": "part 2: ''",
    "+a": "part 1: ''",
    "0*a": "the weight of 'a' is 0",
    "a+-0.000*b": "part 2: the weight of 'b' is 0",
    "nan*a": "'nan' is not a weight",
    "inf*a+b": "part 1: 'inf' is not a weight",
    "1e3*a": "'1e3' is not a weight",
    ".5*a": "'.5' is not a weight",
    "10000*a": "'10000' is not a weight",
    "0.1234567*a": "'0.1234567' is not a weight",
    "a-0.5*b": "'a-0.5' is not a weight",
    "0.5*0.5*a": "'0.5*0.5' is not a weight",
    "*a": "'' is not a weight",
    "0.5*": "'' must match",
    "-a": "'-a' must match",
    "0.7*a + 0.3*b": "part 1: 'a ' must match",
    "a+b@0": "part 2: 'b@0' must match",
    "a@3+b@": "part 2: 'b@' must match",
    "a+../b": "part 2: '../b' must match",
    "٣*a": "'٣' is not a weight",
    "+".join(["a"] * (MAX_PARTS + 1)): "a sum of 9 adapters; at most 8",
    "a" * 2000: "has 2000 characters; at most 1024",
}


@pytest.mark.parametrize("text", UNDERSTOOD)
def test_an_expression_is_its_parts_in_order(text: str) -> None:
    terms = [(term.weight, term.reference) for term in parse_expression(text)]
    assert terms == [(Decimal(weight), reference) for weight, reference in UNDERSTOOD[text]]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_is_told_in_a_sentence_that_names_the_place(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_expression(text, "expression")
    error = caught.value
    assert (error.reason, error.field) == ("ADAPTER_ID_INVALID", "expression")
    assert error.message.startswith("expression ") and REFUSED[text] in error.message and len(error.message) < 400


@given(st.text(alphabet="ab7.-+*@ 0e\n", max_size=30))
def test_any_text_is_understood_or_refused_and_what_is_understood_is_finite(text: str) -> None:
    try:
        terms = parse_expression(text)
    except InvalidRequest:
        return
    assert all(math.isfinite(float(term.weight)) and float(term.weight) for term in terms)
    again = "+".join(term_text(term.weight, term.reference) for term in terms)
    assert parse_expression(again) == terms


def test_weights_have_one_way_of_being_written() -> None:
    texts = [term_text(Decimal(text), "a") for text in ("0.70", "1.0", "-1", "100", "0.000001")]
    assert texts == ["0.7*a", "a", "-1*a", "100*a", "0.000001*a"]


def test_a_sum_names_its_parts_and_itself() -> None:
    assert [names("0.7*a+b@3", text) for text in ("a", "b@3", "0.7*a+b@3", "b", "0.7*a")] == [True] * 3 + [False] * 2
