"""Weighted sums that requests name: each is an adapter of its own, made when it is first named, gone with its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from decimal import Decimal

from runtime.adapters.expression import ONE, parse_expression, term_text, weight_text
from runtime.adapters.info import AdapterState
from runtime.adapters.memory import AdapterMemory
from runtime.adapters.record import AdapterRecord, Part
from runtime.adapters.registry import AdapterRegistry
from runtime.errors import Exhausted, InvalidRequest, NotFound

MAX_SUMS = 1024


def resolve(registry: AdapterRegistry, expression: str, field: str = "adapter_id") -> tuple[Part, ...]:
    """The live generations that an expression means now, in an order that does not depend on how it was written.

    Weights of the same generation are added. Raises NotFound, naming the part, and InvalidRequest.
    """
    weights: dict[AdapterRecord, Decimal] = {}
    for term in parse_expression(expression, field):
        record = registry.get(term.reference)
        weights[record] = weights.get(record, Decimal(0)) + term.weight
    for record, weight in weights.items():
        if not weight:
            message = f"{field}: the weights of adapter {record.name!r} add up to {weight_text(weight)}: leave it out"
            raise InvalidRequest(message, reason="ADAPTER_ID_INVALID", field=field)
    return tuple(Part(weights[record], record) for record in sorted(weights, key=lambda part: part.label))


class AdapterSums:
    """The sums that requests have named. `free` ends one that nobody holds."""

    def __init__(
        self, registry: AdapterRegistry, memory: AdapterMemory, free: Callable[[AdapterRecord], None]
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._free = free
        self._awaiting: set[AdapterRecord] = set()

    def get(self, reference: str) -> AdapterRecord:
        """The generation for NAME, ALIAS, NAME@GENERATION or a sum of such, which is made if it is new.

        Raises InvalidRequest, NotFound (naming the part), and Exhausted if too many sums are in use.
        """
        parts = resolve(self._registry, reference)
        if len(parts) == 1 and parts[0].weight == ONE:
            return parts[0].record
        for part in parts:
            part.record.last_used = time.time()
        name = name_of(parts)
        record = self._registry.find_derived(name)
        if record is None:
            self._make_room()
            record = self._registry.create_derived(name, parts)
            if _is_loading(record):
                record.state = AdapterState.LOADING
                self._awaiting.add(record)
        return record

    def find(self, reference: str) -> AdapterRecord:
        """The sum as it is there; raises NotFound if no request has named it since its parts were loaded."""
        name = name_of(resolve(self._registry, reference, "name"))
        record = self._registry.find_derived(name)
        if record is None:
            raise NotFound(f"no request has used the sum {name}, so nothing is made for it", reason="ADAPTER_NOT_FOUND")
        return record

    def retire(self, part: AdapterRecord) -> list[AdapterRecord]:
        """Let the sums of a generation that is not live any more run to their end; returns them."""
        sums = self._registry.derived_from(part)
        for record in sums:
            self._registry.retire(record)
        return sums

    def follow(self, record: AdapterRecord) -> None:
        """A generation has changed: sums may have waited for it, and one that has left the memory is forgotten."""
        if record.derived:
            if _is_spent(record) and record.error is None:
                self._end(record)
            return
        for waiting in [item for item in self._awaiting if any(part.record is record for part in item.parts)]:
            if record.state is AdapterState.FAILED:
                self._awaiting.discard(waiting)
                message = f"adapter {record.name!r}, which this request waited for, could not be loaded"
                error = NotFound(message, reason="ADAPTER_NOT_FOUND", field="adapter_id")
                self._memory.failures.append((waiting, error))
                self._end(waiting)
            elif not _is_loading(waiting):
                self._begin(waiting)

    def _begin(self, record: AdapterRecord) -> None:
        """All parts are there."""
        self._awaiting.discard(record)
        if record.state is AdapterState.LOADING:
            record.state = AdapterState.REGISTERED
        if record.references:
            self._memory.bring(record)
        elif record.state is AdapterState.REGISTERED:
            self._end(record)

    def _make_room(self) -> None:
        """Forget sums that have left the memory, and if need be the one that was used least recently."""
        now = time.monotonic()
        for record in self._registry.derived().values():
            if _is_spent(record) and record.retry_at <= now:
                self._end(record)
        everything = self._registry.derived().values()
        if len(everything) < MAX_SUMS:
            return
        idle = [record for record in everything if not record.references and record not in self._awaiting]
        if not idle:
            message = f"{len(everything)} different sums of adapters are in use, the most that may be: retry later"
            raise Exhausted(message, reason="ADAPTER_SUMS_FULL", field="adapter_id", retry_seconds=1.0)
        self._end(min(idle, key=lambda record: record.age))

    def _end(self, record: AdapterRecord) -> None:
        """No new requests get it; it is freed at once if nobody holds it."""
        if self._registry.find_derived(record.name) is record:
            self._registry.retire(record)
        self._free(record)


def name_of(parts: tuple[Part, ...]) -> str:
    """The sum as it is written with generations: the same for the same sum."""
    return "+".join(term_text(part.weight, part.record.label) for part in parts)


def _is_loading(record: AdapterRecord) -> bool:
    return any(part.record.state is AdapterState.LOADING for part in record.parts)


def _is_spent(record: AdapterRecord) -> bool:
    """Nobody holds it, and it has no pages: to make it anew takes what it took."""
    is_idle = record.state is AdapterState.REGISTERED and not record.references
    return is_idle and record.host is None and record.slot < 0
