"""The checker finds what is wrong in histories written by hand, and nothing in those that a server may have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.marked_model import expected_tokens, token_of
from tests.history.checker import check, counts, parse_terms
from tests.history.records import Change, History, Marks, Operation, Request

LAST = token_of(3, 0)
OLD, NEW, OTHER, FAR = 10, 11, 500, 4000
NUM_TOKENS = 12


def load(name: str, called: float, returned: float, generation: int, marks: Marks, **more: Any) -> Operation:
    return Operation("load", name, called, returned, generation, marks, **more)


def unload(name: str, called: float, returned: float, **more: Any) -> Operation:
    return Operation("unload", name, called, returned, **more)


def alias(name: str, called: float, returned: float, target: str) -> Operation:
    return Operation("alias", name, called, returned, target=target)


# a@1 is loaded by 2, replaced by a@3 between 10 and 12, unloaded from 20 to 21; b@2 stays; x is a, and then b.
OPERATIONS = [
    load("a", 1, 2, 1, {0: OLD}),
    load("b", 1, 2, 2, {1: OTHER}),
    alias("x", 3, 4, "a"),
    load("a", 10, 12, 3, {0: NEW}, replaced=True),
    alias("x", 14, 15, "b"),
    unload("a", 20, 21, force=True),
]


def request(adapter: str, sent: float, ended: float, by: str, marks: Marks, **more: Any) -> Request:
    tokens = expected_tokens(LAST, marks, NUM_TOKENS)
    return replace(Request(adapter, LAST, NUM_TOKENS, sent, ended, None, tokens, "MAX_TOKENS", answered_by=by), **more)


def failed(adapter: str, sent: float, ended: float, code: str, reason: str = "", **more: Any) -> Request:
    return replace(Request(adapter, LAST, NUM_TOKENS, sent, ended, code=code, reason=reason), **more)


def kinds(*requests: Request, operations: list[Operation] = OPERATIONS, **more: Any) -> list[str]:
    return [violation.kind for violation in check(History(list(requests), operations, **more))]


GOOD = {
    "the base": request("", 5, 6, "", {}),
    "a generation that is live": request("a", 5, 6, "a@1", {0: OLD}),
    "the old one while it is replaced": request("a", 11, 13, "a@1", {0: OLD}),
    "the new one while it is loaded": request("a", 9, 11, "a@3", {0: NEW}),
    "the old one to its end": request("a", 9, 40, "a@1", {0: OLD}, first=9.5),
    "a pin": request("a@1", 5, 6, "a@1", {0: OLD}),
    "a sum": request("0.7*a+0.3*b", 5, 6, "0.7*a@1+0.3*b@2", {0: OLD, 1: OTHER}),
    "a sum in another order": request("b+a@3", 13, 14, "a@3+b@2", {0: NEW, 1: OTHER}),
    "an alias": request("x", 5, 6, "a@1", {0: OLD}),
    "an alias that moved": request("x", 16, 17, "b@2", {1: OTHER}),
    "an alias while it moves": request("x", 13, 16, "a@3", {0: NEW}),
    "one of two prompts in a call": request("a", 11, 13, "a@1,a@3", {0: OLD}),
    "the other one": request("a", 11, 13, "a@1,a@3", {0: NEW}),
    "cancelled": request("a", 5, 6, "", {0: OLD}, tokens=expected_tokens(LAST, {0: OLD}, 4), code="CANCELLED",
                         cancelled=True, stop=""),
    "out of time": failed("a", 5, 5.3, "DEADLINE_EXCEEDED", deadline_seconds=0.3),
    "too little time": failed("a", 5, 5.1, "DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT", deadline_seconds=0.3),
    "its own time limit": request("a", 5, 5.5, "a@1", {0: OLD}, tokens=[], stop="TIME_LIMIT", time_limit_seconds=0.5),
    "not loaded yet": failed("a", 1.5, 1.6, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"),
    "unloaded": failed("a", 19, 20.5, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"),
    "nobody": failed("nobody", 5, 6, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"),
    "replaced before a pin came": failed("a@1", 13, 14, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"),
    "unloaded by force": request("a", 19, 20.5, "a@3", {0: NEW}, tokens=expected_tokens(LAST, {0: NEW}, 3), stop="",
                                 code="ABORTED", reason="ADAPTER_UNLOADED"),
    "no place for long": failed("a", 5, 66, "RESOURCE_EXHAUSTED", "ADAPTER_WAIT_TIMEOUT"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_a_server_may_do_is_no_violation(name: str) -> None:
    assert kinds(GOOD[name], max_wait_seconds=70.0) == []


MIXED = expected_tokens(LAST, {0: OLD}, 6) + expected_tokens(LAST, {0: NEW}, 12)[6:]
STALE_PART = [token_of(5, 4) if token == expected_tokens(LAST, {0: OLD}, 12)[2] else token
              for token in expected_tokens(LAST, {0: OLD}, 12)]  # fmt: skip

BAD = {
    "the base speaks as an adapter": (request("", 5, 6, "", {0: OLD}), "tokens"),
    "the base has a trailer": (request("", 5, 6, "a@1", {}), "trailer"),
    "an adapter speaks as the base": (request("a", 5, 6, "a@1", {}), "tokens"),
    "another adapter": (request("a", 5, 6, "a@1", {0: FAR}), "tokens"),
    "two generations in one answer": (request("a", 11, 13, "a@1", {}, tokens=MIXED), "tokens"),
    "one part of another": (request("a", 5, 6, "a@1", {}, tokens=STALE_PART), "tokens"),
    "the trailer names the old one": (request("a", 11, 13, "a@1", {0: NEW}), "tokens"),
    "the trailer names nobody's": (request("a", 5, 6, "a@99", {0: OLD}), "generation"),
    "the trailer names another adapter": (request("a", 5, 6, "b@2", {1: OTHER}), "trailer"),
    "one of two prompts by neither": (request("a", 11, 13, "a@1,a@3", {0: FAR}), "tokens"),
    "one of two prompts by one that was gone": (request("a", 13, 14, "a@1,a@3", {0: OLD}), "time tokens"),
    "no trailer": (request("a", 5, 6, "", {0: OLD}), "trailer"),
    "replaced, but served on": (request("a", 12.5, 13, "a@1", {0: OLD}), "time"),
    "served before it was loaded": (request("a", 5, 6, "a@3", {0: NEW}), "time"),
    "unloaded, but served on": (request("a", 22, 23, "a@3", {0: NEW}), "time"),
    "a pin of another": (request("a@1", 11, 13, "a@3", {0: NEW}), "trailer"),
    "a sum without a part": (request("a+b", 5, 6, "a@1+b@2", {0: OLD}), "tokens"),
    "a sum of an old part": (request("a+b", 13, 14, "a@1+b@2", {0: OLD, 1: OTHER}), "time"),
    "an alias that had moved": (request("x", 16, 17, "a@3", {0: NEW}), "time"),
    "an alias and a generation that never met": (request("x", 15.5, 17, "a@1", {0: OLD}), "time"),
    "cancelled after another's tokens": (
        request("a", 5, 6, "", {0: FAR}, code="CANCELLED", cancelled=True, stop=""), "time tokens"),
    "cancelled by nobody": (failed("a", 5, 6, "CANCELLED"), "error"),
    "the deadline came early": (failed("a", 5, 5.1, "DEADLINE_EXCEEDED", deadline_seconds=3.0), "error"),
    "no deadline": (failed("a", 5, 6, "DEADLINE_EXCEEDED"), "error"),
    "not found, though it was there": (failed("a", 5, 6, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"), "error"),
    "not found while it is replaced": (failed("a", 11, 12, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"), "error"),
    "a live pin not found": (failed("a@1", 5, 6, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"), "error"),
    "an alias not found": (failed("x", 5, 6, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"), "error"),
    "a sum not found": (failed("a+b", 5, 6, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND"), "error"),
    "ended by force without force": (failed("b", 19, 22, "ABORTED", "ADAPTER_UNLOADED"), "error"),
    "ended by force before it": (failed("a", 5, 6, "ABORTED", "ADAPTER_UNLOADED"), "error"),
    "gave up the place too early": (failed("a", 5, 6, "RESOURCE_EXHAUSTED", "ADAPTER_WAIT_TIMEOUT"), "error"),
    "a defect": (failed("a", 5, 6, "INTERNAL", "INTERNAL"), "error"),
    "waited too long": (request("b", 5, 200, "b@2", {1: OTHER}), "wait"),
    "too few tokens": (request("a", 5, 6, "a@1", {}, tokens=expected_tokens(LAST, {0: OLD}, 5)), "end"),
    "a time limit that nobody set": (request("a", 5, 6, "a@1", {0: OLD}, tokens=[], stop="TIME_LIMIT"), "end"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_server_may_not_do_is_told(name: str) -> None:
    asked, expected = BAD[name]
    assert kinds(asked) and set(kinds(asked)) <= set(expected.split()), check(History([asked], OPERATIONS))


def test_what_the_watch_tells_narrows_the_time_in_which_a_generation_may_have_been_live() -> None:
    asked = request("a", 11.5, 13, "a@1", {0: OLD})
    assert kinds(asked) == []
    assert kinds(asked, changes=[Change(11.2, "a", 3, "READY")]) == ["time"]
    assert kinds(asked, changes=[Change(11.2, "a", 1, "DRAINING")]) == ["time"]
    assert kinds(asked, changes=[Change(11.2, "a", 3, "LOADING")]) == []


def test_one_generation_cannot_have_two_marks() -> None:
    operations = [*OPERATIONS, load("a", 15, 16, 3, {0: FAR}, replaced=True)]
    assert kinds(operations=operations) == ["operations"]
    assert kinds(operations=[*OPERATIONS, load("a", 10, 11, 3, {0: NEW})]) == []


def test_an_adapter_that_requests_register_is_there_but_for_its_unloads() -> None:
    changes = [Change(3, "d", 5, "REGISTERED"), Change(9, "d", 6, "REGISTERED")]
    more: dict[str, Any] = {"operations": [unload("d", 7, 8)], "changes": changes, "on_demand": {"d": {1: FAR}}}
    assert kinds(request("d", 2, 3, "d@5", {1: FAR}), request("d", 8.5, 9, "d@6", {1: FAR}), **more) == []
    assert kinds(request("d", 2, 3, "d@6", {1: FAR}), **more) == ["time"]
    assert kinds(request("d", 8.5, 9, "d@5", {1: FAR}), **more) == ["time"]
    missing = ("INVALID_ARGUMENT", "ADAPTER_NOT_FOUND")
    assert kinds(failed("d", 7.5, 7.6, *missing), **more) == []
    assert kinds(failed("d", 8.5, 8.6, *missing), failed("d", 4, 5, *missing), **more) == ["error", "error"]


def test_a_request_that_waited_for_a_load_that_failed_is_told_so() -> None:
    asked = failed("a", 0.5, 1.5, "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND", answered_by="a@7")
    assert kinds(asked, changes=[Change(1.4, "a", 7, "FAILED")]) == []
    assert kinds(asked) == ["generation"]
    spoke = replace(asked, tokens=expected_tokens(LAST, {0: FAR}, 3))
    assert "generation" in kinds(spoke, changes=[Change(1.4, "a", 7, "FAILED")])


def test_a_folder_that_is_refused_may_be_told_of_by_its_own_requests_only() -> None:
    refused = failed("broken", 5, 6, "FAILED_PRECONDITION", "ADAPTER_REFUSED")
    more: dict[str, Any] = {"broken": {"broken"}, "on_demand": {"broken": {}}}
    assert kinds(refused, **more) == []
    assert kinds(replace(refused, adapter="a"), **more) == ["error"]


def test_terms_and_counts() -> None:
    terms = parse_terms("0.7*a+b@7+-1*c")
    assert [(term.name, term.generation) for term in terms] == [("a", 0), ("b", 7), ("c", 0)] and not parse_terms("")
    told = counts(History([GOOD["the base"], GOOD["nobody"]], OPERATIONS))
    assert (told["requests"], told["tokens"], told["replacements"]) == (2, NUM_TOKENS, 1)
    assert (told["request OK"], told["request ADAPTER_NOT_FOUND"], told["load OK"]) == (1, 1, 3)
