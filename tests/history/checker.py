"""Whether a history is one that the server may have: each answer from one generation, which was live, and so it says.

Nothing is assumed about what happens inside. A response is right if there is a moment, between the sending of the
request and its first token, at which all that it names may have been live, and if every token of it is one that those
generations write (`benchmarks/marked_model.py`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.marked_model import expected_tokens
from tests.history.lives import Life, Lives
from tests.history.records import History, Marks, Request

SLACK_SECONDS = 0.05  # between clocks of client, server and gRPC
TOLD_TOKENS = 24
GENERATION_SIGN, SEVERAL_SIGN = "@", ","


@dataclass(frozen=True)
class Violation:
    """What is wrong; `kind` is one word for it."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Term:
    """A part of what a request names."""

    name: str
    generation: int  # 0: whichever is live


def check(history: History) -> list[Violation]:
    """Everything that is wrong with a history, in the order of its requests."""
    lives = Lives.of(history)
    violations = [Violation("operations", told) for told in lives.told]
    for request in history.requests:
        violations += _RequestCheck(history, lives, request).violations()
    return violations


def counts(history: History) -> dict[str, int]:
    """What happened how often, for a report."""
    told = Counter[str]({"requests": len(history.requests), "operations": len(history.operations)})
    for request in history.requests:
        told[f"request {request.reason or request.code}"] += 1
        told["tokens"] += len(request.tokens)
        told["requests with tokens"] += bool(request.tokens)
        told["requests read with a pause"] += request.paused and request.code == "OK"
    for operation in history.operations:
        told[f"{operation.kind} {operation.reason or operation.code}"] += 1
        told["replacements"] += operation.replaced
    return dict(sorted(told.items()))


def parse_terms(reference: str) -> list[Term]:
    """The names in `0.7*a+0.3*b@7`; weights do not matter here."""
    terms = []
    for part in reference.split("+") if reference else []:
        name, _, generation = part.rpartition("*")[2].partition(GENERATION_SIGN)
        terms.append(Term(name, int(generation or 0)))
    return terms


class _RequestCheck:
    """One request against what was live."""

    def __init__(self, history: History, lives: Lives, request: Request) -> None:
        self._history = history
        self._lives = lives
        self._request = request

    def violations(self) -> Iterator[Violation]:
        request = self._request
        yield from self._check_end()
        waited = request.begun_by - request.sent
        if waited > self._history.max_wait_seconds:
            bound = self._history.max_wait_seconds
            yield self._told("wait", f"waited {waited:.1f} s, more than {bound:g} s")
        if request.code == "OK" and request.adapter and not request.answered_by:
            yield self._told("trailer", "no trailer says who answered")
        if not request.adapter and request.answered_by:
            yield self._told("trailer", "the base answered under the name of an adapter")
        if not request.adapter and not self._writes({}):
            yield self._told("tokens", "the base does not say this")
        elif request.adapter and (request.tokens or request.answered_by):
            # The trailer of a call with several prompts may name several: this one was answered by one of them.
            found = [list(self._check_answer(label)) for label in request.answered_by.split(SEVERAL_SIGN)]
            yield from min(found, key=len)

    def _check_answer(self, label: str) -> Iterator[Violation]:
        """Some choice of generations must fit what was asked, what the trailer says, the time and the tokens."""
        said = parse_terms(label)
        unknown = [term for term in said if self._lives.find(term.name, term.generation) is None]
        if unknown and not self._request.tokens and self._waited_in_vain(unknown):
            return
        if unknown:
            yield self._told("generation", f"nobody loaded {unknown[0].name}@{unknown[0].generation}")
            return
        meant = [choice for choice in self._choices(said) if self._is_named(choice, said)]
        in_time = [choice for choice in meant if self._may_be_live(choice)]
        if not meant:
            yield self._told("trailer", "the trailer names what the request did not ask for")
        elif not any(self._writes(_joined(choice)) for choice in meant):
            yield self._told("tokens", f"none of {_labels(meant)} writes this")
        elif not in_time:
            yield self._told("time", f"{_labels(meant)} was not live at any moment while the request waited")
        elif not any(self._writes(_joined(choice)) for choice in in_time):
            yield self._told("tokens", f"none of {_labels(in_time)}, which were live, writes this")

    def _waited_in_vain(self, unknown: list[Term]) -> bool:
        """Whether these are loads that failed; a request that waited for one is told NOT_FOUND, as if it had not."""
        told = self._request.reason or self._request.code
        is_told = told in ("ADAPTER_NOT_FOUND", "CANCELLED", "DEADLINE_EXCEEDED")
        return is_told and all((term.name, term.generation) in self._lives.failed for term in unknown)

    def _choices(self, said: list[Term]) -> Iterator[tuple[Life, ...]]:
        """Every choice of one generation for each part, with the aliases by which they were found.

        Of those that the trailer says, or, where none came, of those that may have been live.
        """
        options = [list(self._options(term, said)) for term in parse_terms(self._request.adapter)]
        for chosen in itertools.product(*options):
            yield tuple(itertools.chain.from_iterable(chosen))

    def _options(self, term: Term, said: list[Term]) -> Iterator[tuple[Life, ...]]:
        ways = [(alias,) for alias in self._lives.aliases.get(term.name, [])] or [()]
        for way in ways:
            name = way[0].name if way else term.name
            generations = self._lives.by_name.get(name, {})
            if said:
                found = [generations.get(part.generation) for part in said if part.name == name]
            else:
                found = [life for life in generations.values() if self._may_be_live((*way, life))]
            for life in found:
                if life is not None and term.generation in (0, life.generation):
                    yield (*way, life)

    def _is_named(self, choice: tuple[Life, ...], said: list[Term]) -> bool:
        chosen = {Term(life.name, life.generation) for life in choice if life.generation}
        return not said or chosen == set(said)

    def _may_be_live(self, choice: tuple[Life, ...]) -> bool:
        start = max(self._request.sent, *(life.from_earliest for life in choice))
        end = min(self._request.begun_by, *(life.to_latest for life in choice))
        return start <= end + SLACK_SECONDS

    def _writes(self, marks: Marks) -> bool:
        request = self._request
        return request.tokens == expected_tokens(request.last_token, marks, len(request.tokens))

    def _check_end(self) -> Iterator[Violation]:
        """A request ends with all its tokens, or for a reason that can have been one just then."""
        request = self._request
        took = request.ended - request.sent + SLACK_SECONDS
        if request.code == "OK":
            all_there = len(request.tokens) == request.max_new_tokens and request.stop == "MAX_TOKENS"
            timed_out = request.stop == "TIME_LIMIT" and took >= (request.time_limit_seconds or math.inf)
            if not all_there and not timed_out:
                asked = f"{len(request.tokens)} of {request.max_new_tokens} tokens"
                yield self._told("end", f"ended with {asked}, {request.stop or 'no stop reason'}")
        elif not self._is_legitimate(took):
            yield self._told("error", f"{request.code} {request.reason}: {request.details[:200]}")

    def _is_legitimate(self, took: float) -> bool:
        request = self._request
        match request.code, request.reason:
            case "CANCELLED", "":
                return request.cancelled
            case "DEADLINE_EXCEEDED", "":
                return took >= (request.deadline_seconds or math.inf)
            case "DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT":
                return request.deadline_seconds is not None
            case "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND":
                return not request.tokens and self._may_be_missing()
            case "FAILED_PRECONDITION", "ADAPTER_REFUSED":
                return request.adapter in self._history.broken
            case "ABORTED", "ADAPTER_UNLOADED":
                return self._may_be_unloaded_by_force()
            case "RESOURCE_EXHAUSTED", "ADAPTER_WAIT_TIMEOUT":
                return took >= self._history.max_adapter_wait_seconds
        return False

    def _may_be_missing(self) -> bool:
        return any(not self._is_surely_there(term) for term in parse_terms(self._request.adapter))

    def _is_surely_there(self, term: Term) -> bool:
        start, end = self._request.sent, self._request.ended
        if term.generation:
            life = self._lives.find(term.name, term.generation)
            return life is not None and life.from_latest <= start and end <= life.to_earliest
        if term.name in self._lives.aliases:
            targets = [alias for alias in self._lives.aliases[term.name]
                       if alias.from_latest <= start and end <= alias.to_earliest]  # fmt: skip
            return any(self._lives.is_surely_present(alias.name, start, end) for alias in targets)
        return self._lives.is_surely_present(term.name, start, end)

    def _may_be_unloaded_by_force(self) -> bool:
        labels = (self._request.answered_by or self._request.adapter).split(SEVERAL_SIGN)
        names = {term.name for label in labels for term in parse_terms(label)}
        names |= {alias.name for name in names for alias in self._lives.aliases.get(name, [])}
        return any(
            item.kind == "unload" and item.force and item.name in names
            and item.called <= self._request.ended + SLACK_SECONDS and item.returned >= self._request.sent
            for item in self._history.operations
        )  # fmt: skip

    def _told(self, kind: str, message: str) -> Violation:
        request = self._request
        about = f"request for {request.adapter or 'the base'!r}, answered by {request.answered_by or 'nobody'!r}, "
        about += f"{request.sent:.3f} to {request.begun_by:.3f} and {request.ended:.3f} s, after {request.last_token}"
        return Violation(kind, f"{message} ({about}, tokens {request.tokens[:TOLD_TOKENS]})")


def _joined(choice: tuple[Life, ...]) -> Marks:
    return {channel: mark for life in choice for channel, mark in life.marks.items()}


def _labels(choices: list[tuple[Life, ...]]) -> str:
    labels = ["+".join(f"{life.name}@{life.generation}" for life in choice if life.generation) for choice in choices]
    return ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
