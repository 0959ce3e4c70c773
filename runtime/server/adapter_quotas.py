"""How many requests and tokens each adapter has in the server: bounded, so that none takes the places of all.

The base is no adapter and has no bound of its own, as on a server that never saw one: the queue's holds for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from runtime.errors import Exhausted

BASE = ""
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 30.0


@dataclass
class Use:
    """What the requests of one adapter take up, from their admission to their end. Tokens are prompts and answers."""

    num_requests: int = 0
    num_tokens: int = 0


class AdapterQuotas:
    """Counts by adapter names, and those of the base. A weighted sum takes a place of each of its parts.

    A sum counts for its parts because clients choose the weights: as itself it would have a quota for each weight. A
    sum that an operator has named counts as itself. 0 is no bound.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._uses: dict[str, Use] = {}

    @contextmanager
    def enter(self, names: frozenset[str], num_requests: int, wait_seconds: float) -> Iterator[Places]:
        """Places for all requests of a call, or none; they are given back one by one, the rest in the end.

        `wait_seconds` is how long a new request is thought to wait. Raises Exhausted.
        """
        places = Places(self, names, wait_seconds)
        self.take(places, num_requests, 0)
        try:
            yield places
        finally:
            self.give_back(places, places.num_requests, places.num_tokens)

    def take(self, places: Places, num_requests: int, num_tokens: int) -> None:
        """So many more for each adapter of the call; raises Exhausted, having taken nothing, if one has no room."""
        for name in sorted(places.names - {BASE}):
            use = self._uses.get(name, Use())
            if _is_over(use.num_requests, num_requests, self._max_requests):
                message = _refusal(name, "requests", use.num_requests, num_requests, self._max_requests)
                seconds = places.retry_seconds(num_requests, self._max_requests)
                raise Exhausted(message, reason="ADAPTER_REQUESTS_FULL", retry_seconds=seconds)
            if _is_over(use.num_tokens, num_tokens, self._max_tokens):
                message = _refusal(name, "tokens", use.num_tokens, num_tokens, self._max_tokens)
                seconds = places.retry_seconds(num_tokens, self._max_tokens)
                raise Exhausted(message, reason="ADAPTER_TOKENS_FULL", retry_seconds=seconds)
        for name in places.names:
            use = self._uses.setdefault(name, Use())
            use.num_requests += num_requests
            use.num_tokens += num_tokens
        places.num_requests += num_requests
        places.num_tokens += num_tokens

    def give_back(self, places: Places, num_requests: int, num_tokens: int) -> None:
        """So many less; adapters that have nothing here are forgotten."""
        for name in places.names:
            use = self._uses.setdefault(name, Use())
            use.num_requests -= num_requests
            use.num_tokens -= num_tokens
            if not use.num_requests and not use.num_tokens:
                del self._uses[name]
        places.num_requests -= num_requests
        places.num_tokens -= num_tokens

    def share_of_queue(self, names: frozenset[str]) -> float:
        """Which part of the queue's wait a new request may expect, up to 1: adapters take turns.

        With n requests of its own before it, it begins after about n + 1 of each adapter that has any here.
        """
        total = sum(use.num_requests for use in self._uses.values())
        own = max((self._uses[name].num_requests for name in names if name in self._uses), default=0)
        return min(1.0, (own + 1) * len(self._uses.keys() | names) / total) if total else 1.0


class Places:
    """What one call has taken: `num_requests` of each adapter in `names`, and `num_tokens`."""

    def __init__(self, quotas: AdapterQuotas, names: frozenset[str], wait_seconds: float) -> None:
        self.names = names
        self.wait_seconds = wait_seconds
        self.num_requests = 0
        self.num_tokens = 0
        self._quotas = quotas

    def add_tokens(self, tokens_of_requests: Sequence[int]) -> None:
        """How many tokens the requests of the call may come to, now that it is known; raises Exhausted."""
        self._quotas.take(self, 0, sum(tokens_of_requests))

    def end_one(self, num_tokens: int) -> None:
        """One request of the call, of so many tokens, has ended: its place is free."""
        self._quotas.give_back(self, 1, num_tokens)

    def retry_seconds(self, wanted: int, limit: int) -> float | None:
        """When the call may come back; None if it alone wants more than there may be."""
        return None if wanted > limit else min(max(self.wait_seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)


def _is_over(used: int, wanted: int, limit: int) -> bool:
    return bool(limit and wanted) and used + wanted > limit


def _refusal(name: str, what: str, used: int, wanted: int, limit: int) -> str:
    advice = "send fewer at once" if wanted > limit else "retry later"
    return (
        f"adapter {name!r} has {used} {what} in the server, and this call would add {wanted}; "
        f"one adapter may have {limit}: {advice}, or raise --max-adapter-{what}"
    )
