"""Text and stop sequences, on tokens whose borders lie anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.server.text import TextStream


class Pieces:
    """A detokenizer whose token ids number given pieces of text; `rest` comes with flush."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return self._rest


def run(pieces: list[str], stops: list[str], include: bool = True, minimum: int = 0, rest: str = "") -> tuple:
    """The text, the stop sequence and the number of tokens taken."""
    stream = TextStream(Pieces(pieces, rest), stops, include, minimum)
    text = ""
    for token_id in range(len(pieces)):
        update = stream.push(token_id)
        text += update.text
        if update.stop_sequence is not None:
            return text, update.stop_sequence, token_id + 1
    update = stream.finish()
    return text + update.text, update.stop_sequence, len(pieces)


@pytest.mark.parametrize("pieces", [["one STOP two"], ["one S", "TO", "P two"], list("one STOP two")])
@pytest.mark.parametrize(("include", "text"), [(True, "one STOP"), (False, "one ")])
def test_a_stop_sequence_is_found_wherever_the_token_borders_lie(pieces: list, include: bool, text: str) -> None:
    assert run(pieces, ["STOP"], include)[:2] == (text, "STOP")


def test_what_may_start_a_stop_sequence_is_held_back_and_given_out_when_it_does_not() -> None:
    stream = TextStream(Pieces(["a\n", "\nUs", "ual"]), ["\n\nUser:"])
    assert [stream.push(n).text for n in range(3)] == ["a", "", "\n\nUsual"]


def test_what_is_held_back_comes_out_at_the_end() -> None:
    assert run(["text ST", "O"], ["STOP"]) == ("text STO", None, 2)


def test_the_stop_sequence_that_is_complete_first_wins() -> None:
    assert run(["abcdef"], ["cdef", "bcd"], include=False) == ("a", "bcd", 1)


def test_of_two_that_end_together_the_longer_wins() -> None:
    assert run(["xabc"], ["c", "abc"], include=False) == ("x", "abc", 1)


def test_stop_sequences_count_only_from_the_minimum_on() -> None:
    assert run(["a.", "b.", "c.", "d."], ["."], minimum=3) == ("a.b.c.", ".", 3)


def test_a_stop_sequence_may_begin_before_the_minimum_and_end_after_it() -> None:
    assert run(["aS", "TO", "Pb"], ["STOP"], include=False, minimum=3) == ("a", "STOP", 3)


def test_a_stop_sequence_that_ended_before_the_minimum_does_not_count_later() -> None:
    assert run(["aX", "b", "c"], ["X", "Xbz"], minimum=2) == ("aXbc", None, 3)


def test_a_stop_sequence_completed_by_the_last_held_bytes_counts() -> None:
    assert run(["a"], ["a\ufffd"], rest="\ufffd") == ("a\ufffd", "a\ufffd", 1)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text ends with a stop sequence."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[:end], max(found, key=len)
    return text, None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab ", max_size=4), max_size=12), st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4))
def test_any_cut_into_tokens_gives_the_text_of_the_definition(pieces: list[str], stops: list[str]) -> None:
    text, stop, _ = run(pieces, stops)
    expected, expected_stop = reference("".join(pieces), stops)
    assert stop == expected_stop
    assert text == expected
