"""Loads under way: each one checks, reads, and then changes everything or nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.memory import AdapterMemory
from runtime.adapters.reader import ReadAdapter
from runtime.adapters.record import AdapterFacts, AdapterRecord, Part, Source
from runtime.adapters.registry import AdapterRegistry
from runtime.adapters.sums import resolve
from runtime.engine.messages import CallId, LoadAdapter
from runtime.errors import AlreadyExists, Conflict, Exhausted, GraftError, InvalidRequest, NotFound

MAX_REMEMBERED_REQUESTS = 1024

Reply: TypeAlias = Callable[[AdapterInfo | GraftError], None]


@dataclass(eq=False)
class _Load:
    """One load and all who asked for it. `live` was live when it began; `record` is the generation that it makes.

    A sum has `parts`, the generations that its expression meant when it began.
    """

    command: LoadAdapter
    parts: tuple[Part, ...]
    live: AdapterRecord | None
    record: AdapterRecord | None
    replies: list[Reply] = field(default_factory=list)


class Loads:
    """At most one load for each name; the same one again is joined, another one is turned away."""

    def __init__(
        self,
        registry: AdapterRegistry,
        memory: AdapterMemory,
        on_change: Callable[[AdapterRecord], None],
        free_if_idle: Callable[[AdapterRecord], None],
        check_pins: Callable[[AdapterRecord], None],
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._on_change = on_change
        self._free_if_idle = free_if_idle
        self._check_pins = check_pins
        self._loads: dict[str, _Load] = {}
        self._remembered: OrderedDict[str, tuple[LoadAdapter, AdapterInfo]] = OrderedDict()

    def is_changing(self, name: str) -> bool:
        """Whether a load under way is going to give this name a generation."""
        load = self._loads.get(name)
        return load is not None and load.record is not None

    def start(self, command: LoadAdapter, reply: Reply) -> None:
        """Begin or join; raises what can be said at once."""
        if (remembered := self._repeated(command)) is not None:
            reply(remembered)
            return
        parts = self._parts(command)
        load = self._loads.get(command.name)
        if load is not None:
            if _plain(load.command) != _plain(command) or load.parts != parts:
                raise Conflict(f"adapter {command.name!r} is LOADING: try again later", reason="ADAPTER_BUSY")
            load.replies.append(reply)
            return
        self._registry.check_generation(command.name, command.expected_generation)
        live = self._registry.find(command.name)
        if live is not None and live.name == command.name and command.lazy and not command.replace:
            raise AlreadyExists(f"adapter {command.name!r} is there already", reason="ADAPTER_EXISTS")
        if command.lazy:
            self._register(command, reply)
            return
        load = self._loads[command.name] = self._begin(command, parts, live, reply)
        self._memory.reader.read(command.name, _source(command, parts), partial(self._settle, load))

    def _parts(self, command: LoadAdapter) -> tuple[Part, ...]:
        """What a sum is made of; raises NotFound, naming the part, and Conflict while a part is loading."""
        if not command.expression:
            return ()
        parts = resolve(self._registry, command.expression, "expression")
        for part in parts:
            if part.record.state is AdapterState.LOADING:
                raise Conflict(f"adapter {part.record.name!r} is LOADING: try again later", reason="ADAPTER_BUSY")
        return parts

    def _begin(
        self, command: LoadAdapter, parts: tuple[Part, ...], live: AdapterRecord | None, reply: Reply
    ) -> _Load:
        record = None
        is_alias = self._registry.resolve(command.name) != command.name
        if is_alias or (not command.validate_only and (live is None or command.replace)):
            record = self._registry.create(command.name, command.path, command.expected_digest, AdapterState.LOADING)
            record.parts = parts
            self._on_change(record)
        return _Load(command, parts, live, record, [reply])

    def _register(self, command: LoadAdapter, reply: Reply) -> None:
        """A generation that is not read before somebody names it."""
        record = self._registry.create(
            command.name, command.path, command.expected_digest, AdapterState.REGISTERED
        )
        replaced = self._registry.promote(record)
        if replaced is not None:
            self._on_change(replaced)
            self._free_if_idle(replaced)
        self._on_change(record)
        reply(record.info())

    def _settle(self, load: _Load, read: ReadAdapter | GraftError) -> None:
        """The files have been read, or could not be."""
        try:
            if isinstance(read, GraftError):
                raise read
            self._apply(load, read)
        except GraftError as error:
            self._fail(load, error)

    def _apply(self, load: _Load, read: ReadAdapter) -> None:
        command, live = load.command, self._registry.find(load.command.name)
        if live is not (load.live or load.record):
            message = f"adapter {command.name!r} was unloaded meanwhile: load again"
            raise Conflict(message, reason="ADAPTER_BUSY")
        is_same = load.live is not None and _stands_for(load.live, command, load.parts, read)
        if load.live is not None and not is_same and not command.replace:
            message = (
                f"adapter {command.name!r} is loaded with {load.live.digest or 'files not read yet'}, "
                f"not {read.digest}: load it with replace, or unload it first"
            )
            raise AlreadyExists(message, reason="ADAPTER_EXISTS")
        if command.validate_only:
            self._finish(load, self._checked(load, read, is_same))
        elif load.live is not None and is_same:
            self._adopt(load, load.live, read)
        elif load.record is not None:
            self._place(load, load.record, read)

    def _checked(self, load: _Load, read: ReadAdapter, is_same: bool) -> AdapterInfo:
        """What a load would have made of these files."""
        command = load.command
        checked = AdapterRecord(command.name, 0, command.path, read.digest, AdapterState.UNSPECIFIED)
        self._memory.check_size(checked, read)
        checked.facts, checked.load_seconds, checked.parts = read.facts, read.seconds, load.parts
        return checked.info(already_loaded=is_same)

    def _adopt(self, load: _Load, live: AdapterRecord, read: ReadAdapter) -> None:
        """These bytes are live already, or registered and now read."""
        if load.record is not None:
            self._registry.forget(load.record)
            load.record.state = AdapterState.UNLOADED
            self._on_change(load.record)
        if live.host is None and not live.is_resident:
            self._memory.keep(live, read)
            live.state = AdapterState.READY
            if load.command.pinned or live.references:
                self._memory.bring(live)
            self._on_change(live)
        if load.command.pinned and not live.pinned:
            self._check_pins(live)
            live.pinned = True
            self._memory.bring(live)
            self._on_change(live)
        self._finish(load, live.info(already_loaded=True))

    def _place(self, load: _Load, record: AdapterRecord, read: ReadAdapter) -> None:
        """Host memory, and the device if there is a place; then it is ready."""
        self._memory.keep(record, read)
        replaces_resident = load.live is not None and load.live.is_resident
        pinned = load.command.pinned or (load.live is not None and load.live.pinned)
        if pinned:
            self._check_pins(record)
        evict = pinned or replaces_resident or record.references > 0
        if self._memory.seat(record, partial(self._seated, load), evict=evict):
            return
        if pinned:
            message = f"adapter {record.name!r} cannot be pinned: no place on the device can be freed now"
            raise Exhausted(message, reason="ADAPTER_SLOTS_FULL", retry_seconds=1.0)
        self._make_ready(load, record)

    def _seated(self, load: _Load, error: GraftError | None) -> None:
        if error is not None:
            self._fail(load, error)
        elif load.record is not None:
            self._make_ready(load, load.record)

    def _make_ready(self, load: _Load, record: AdapterRecord) -> None:
        """The one moment in which a name changes what it stands for."""
        was_pinned = load.live is not None and load.live.pinned
        replaced = self._registry.promote(record)
        record.state = AdapterState.READY
        record.pinned = load.command.pinned or was_pinned
        if replaced is not None:
            self._on_change(replaced)
        self._on_change(record)
        if replaced is not None:
            self._free_if_idle(replaced)
        if record.references or record.pinned:
            self._memory.bring(record)
        self._finish(load, record.info())

    def _fail(self, load: _Load, error: GraftError) -> None:
        """Everything is as before; requests that waited for a first load are told that it came to nothing."""
        record = load.record
        if record is not None:
            self._memory.drop(record)
            record.state, record.error = AdapterState.FAILED, error
            self._registry.forget(record)
            self._on_change(record)
            message = "the adapter that this request waited for could not be loaded"
            self._memory.failures.append((record, NotFound(message, reason="ADAPTER_NOT_FOUND", field="adapter_id")))
        self._finish(load, error)

    def _finish(self, load: _Load, answer: AdapterInfo | GraftError) -> None:
        del self._loads[load.command.name]
        if load.command.request_id and isinstance(answer, AdapterInfo):
            self._remembered[load.command.request_id] = (_plain(load.command), answer)
            if len(self._remembered) > MAX_REMEMBERED_REQUESTS:
                self._remembered.popitem(last=False)
        for reply in load.replies:
            reply(answer)

    def _repeated(self, command: LoadAdapter) -> AdapterInfo | None:
        """What a call with this request_id was answered; raises InvalidRequest if it asked for other things."""
        remembered = self._remembered.get(command.request_id) if command.request_id else None
        if remembered is None:
            return None
        if remembered[0] != _plain(command):
            message = f"request_id {command.request_id!r} was that of another load"
            raise InvalidRequest(message, reason="REQUEST_ID_REUSED", field="request_id")
        return remembered[1]


def _source(command: LoadAdapter, parts: tuple[Part, ...]) -> Source:
    sources = tuple((part.weight, part.record.source()) for part in parts)
    return Source(command.name, command.path, command.expected_digest, AdapterFacts(), None, sources)


def _stands_for(live: AdapterRecord, command: LoadAdapter, parts: tuple[Part, ...], read: ReadAdapter) -> bool:
    """Whether a generation is of these bytes; one that was never read is of those at its own path."""
    if live.digest:
        return live.digest == read.digest
    return live.path == command.path and live.parts == parts


def _plain(command: LoadAdapter) -> LoadAdapter:
    """What a load asks for, whoever asks."""
    return replace(command, call_id=CallId(0), request_id="")
