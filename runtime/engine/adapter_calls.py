"""What operators ask about adapters, and what they are answered."""

from __future__ import annotations

from collections.abc import Callable

from runtime.adapters.info import AdapterInfo, AliasInfo
from runtime.adapters.record import AdapterRecord
from runtime.adapters.store import AdapterStore
from runtime.engine.messages import (
    AdapterCall,
    AdapterReply,
    AliasChanged,
    AliasReply,
    CallFailed,
    CallId,
    Event,
    ListAdapters,
    ListAliases,
    LoadAdapter,
    PinAdapter,
    SetAlias,
    UnloadAdapter,
)
from runtime.errors import GraftError, NotFound


class AdapterCalls:
    """Takes each call to the store; every call is answered once, at once or later, through `emit`."""

    def __init__(self, store: AdapterStore, emit: Callable[[Event], None]) -> None:
        self._store = store
        self._emit = emit

    def take(self, command: AdapterCall) -> list[AdapterRecord]:
        """Obey; returns the generations whose requests have to end with ABORTED."""
        reply = self._replier(command.call_id)
        match command:
            case LoadAdapter():
                self._store.load(command, reply)
            case UnloadAdapter():
                draining = self._store.unload(command, self._unless_missing(command, reply))
                return draining if command.force else []
            case PinAdapter():
                self._store.pin(command, reply)
            case SetAlias() | ListAliases():
                self._tell_aliases(command)
            case ListAdapters(call_id, name):
                try:
                    infos = [self._store.info(name)] if name else self._store.infos()
                    self._emit(AdapterReply(call_id, infos))
                except GraftError as error:
                    reply(error)
        return []

    def _tell_aliases(self, command: SetAlias | ListAliases) -> None:
        registry = self._store.registry
        try:
            if isinstance(command, ListAliases):
                aliases = registry.aliases()
            elif command.adapter:
                aliases = [registry.set_alias(command.alias, command.adapter)]
                self._emit(AliasChanged(aliases[0]))
            else:
                aliases = [registry.delete_alias(command.alias)]
                self._emit(AliasChanged(AliasInfo(command.alias, "")))
            self._emit(AliasReply(command.call_id, aliases))
        except GraftError as error:
            self._emit(_failed(command.call_id, error))

    def _unless_missing(
        self, command: UnloadAdapter, reply: Callable[[AdapterInfo | GraftError], None]
    ) -> Callable[[AdapterInfo | GraftError], None]:
        def reply_unless_missing(answer: AdapterInfo | GraftError) -> None:
            if isinstance(answer, NotFound) and command.allow_missing:
                self._emit(AdapterReply(command.call_id, []))
            else:
                reply(answer)

        return reply_unless_missing

    def _replier(self, call_id: CallId) -> Callable[[AdapterInfo | GraftError], None]:
        def reply(answer: AdapterInfo | GraftError) -> None:
            if isinstance(answer, AdapterInfo):
                self._emit(AdapterReply(call_id, [answer]))
            else:
                self._emit(_failed(call_id, answer))

        return reply


def _failed(call_id: CallId, error: GraftError) -> CallFailed:
    told = (error.message, error.reason, error.field, list(error.problems), error.retry_seconds)
    return CallFailed(call_id, error.kind, *told)
