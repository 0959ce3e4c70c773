"""Operators of a storm: each owns some names, and loads, replaces, pins, unloads and aliases them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import duration_pb2

from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub
from tests.history.clients import reason_of
from tests.history.plan import ALIASES, BROKEN, COMPOSED, LOADED, ON_DEMAND, Folders, channel_of
from tests.history.records import Change, History, Marks, Operation

CALL_TIMEOUT_SECONDS = 60.0
NAME_PREFIX = "adapters/"


class Operator:
    """Owns `names`; what it is told goes into the history. `generations` is shared with the clients."""

    def __init__(
        self, channel: grpc.aio.Channel, draw: random.Random, names: list[str], history: History, folders: Folders,
        generations: dict[str, int],
    ) -> None:  # fmt: skip
        self._stub = AdapterServiceStub(channel)
        self._draw = draw
        self._names = names
        self._history = history
        self._folders = folders
        self._generations = generations
        self._live: set[str] = set()

    async def load_all(self) -> None:
        """Once each, so that clients find something."""
        for name in self._names:
            if name in LOADED:
                await self._load(name)
            elif name in ALIASES:
                await self._move_alias(name)

    async def act(self) -> None:
        """One thing, whatever comes next."""
        name = self._draw.choice(self._names)
        if name in ALIASES:
            await self._move_alias(name)
        elif name in ON_DEMAND:
            await self._unload(name)
        elif name == COMPOSED:
            await (self._compose() if self._draw.random() < 0.7 else self._unload(name))
        elif name not in self._live:
            await self._load(name)
        else:
            await self._change(name)

    async def _change(self, name: str) -> None:
        kind = self._draw.random()
        if kind < 0.60:
            await self._load(name)
        elif kind < 0.82:
            await self._unload(name)
        elif kind < 0.90:
            await self._told(self._stub.PinAdapter, pb.PinAdapterRequest(name=name))
            await self._told(self._stub.UnpinAdapter, pb.UnpinAdapterRequest(name=name))
        elif kind < 0.95:
            request = pb.LoadAdapterRequest(adapter_id=name, source_path=BROKEN, replace=True)
            await self._called(Operation("load", name, 0.0), self._stub.LoadAdapter, request)
        else:
            wrong = self._generations.get(name, 1) + 10_000
            request = pb.LoadAdapterRequest(adapter_id=name, source_path=BROKEN, expected_generation=wrong)
            await self._called(Operation("load", name, 0.0), self._stub.LoadAdapter, request)

    async def _load(self, name: str) -> None:
        """Load or replace, read now or when it is asked for, sometimes by two calls at once."""
        folder, marks = await asyncio.to_thread(self._folders.write, name)
        kind, replaces = self._draw.random(), name in self._live
        request = pb.LoadAdapterRequest(
            adapter_id=name, source_path=folder, replace=True, lazy=kind < 0.2, pinned=0.2 < kind < 0.25
        )
        calls = [self._called(self._operation(name, marks, replaces), self._stub.LoadAdapter, request)]
        if kind > 0.9:
            calls.append(self._called(self._operation(name, marks, False), self._stub.LoadAdapter, request))
        for operation in await asyncio.gather(*calls):
            if operation.generation:
                self._live.add(name)
                self._generations[name] = operation.generation
        if request.pinned:
            await self._told(self._stub.UnpinAdapter, pb.UnpinAdapterRequest(name=name))

    def _operation(self, name: str, marks: Marks, replaces: bool) -> Operation:
        return Operation("load", name, 0.0, marks=marks, replaced=replaces)

    async def _compose(self) -> None:
        """A sum under a name of its own; its marks are those of the generations that it was made of."""
        parts = [self._draw.choice([name for name in LOADED if channel_of(name) == channel]) for channel in (0, 1)]
        request = pb.ComposeAdapterRequest(adapter_id=COMPOSED, expression="+".join(parts), replace=True)
        operation = self._operation(COMPOSED, {}, COMPOSED in self._live)
        await self._called(operation, self._stub.ComposeAdapter, request)
        if operation.generation:
            self._live.add(COMPOSED)

    async def _unload(self, name: str) -> None:
        """Wait to the end, or for a moment, or end what runs."""
        kind = self._draw.random()
        request = pb.UnloadAdapterRequest(name=name, allow_missing=kind > 0.95)
        if kind < 0.4:
            request.drain_timeout.CopyFrom(duration_pb2.Duration(nanos=self._draw.randint(0, 200_000_000)))
        request.force = 0.4 <= kind < 0.6
        self._live.discard(name)
        await self._called(Operation("unload", name, 0.0, force=request.force), self._stub.UnloadAdapter, request)
        if name in LOADED and self._draw.random() < 0.7:
            await self._load(name)

    async def _move_alias(self, alias: str) -> None:
        if self._draw.random() < 0.1:
            request = pb.DeleteAliasRequest(alias=alias)
            await self._called(Operation("unalias", alias, 0.0), self._stub.DeleteAlias, request)
            return
        target = self._draw.choice(LOADED)
        set_alias = pb.SetAliasRequest(alias=alias, adapter_id=target)
        await self._called(Operation("alias", alias, 0.0, target=target), self._stub.SetAlias, set_alias)

    async def _called(self, operation: Operation, method: Callable[..., Awaitable[Any]], request: object) -> Operation:
        """Call, and record when, and what was answered."""
        operation.called = time.monotonic()
        try:
            response = await method(request, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            operation.code, operation.reason = error.code().name, reason_of(error)
            operation.replaced = False
        else:
            if operation.kind == "load":
                operation.generation = response.adapter.generation
                self._note_parts(operation, response.adapter)
        operation.returned = time.monotonic()
        self._history.operations.append(operation)
        return operation

    def _note_parts(self, operation: Operation, adapter: pb.Adapter) -> None:
        for part in adapter.parts:
            made = [item for item in self._history.operations if item.name == part.adapter_id
                    and item.generation == part.generation]  # fmt: skip
            if not made:  # its own load has not returned yet: the digest of the folder is not told for parts
                continue
            operation.marks |= made[0].marks

    async def _told(self, method: Callable[..., Awaitable[Any]], request: object) -> None:
        """What changes no generation is not recorded."""
        try:
            await method(request, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
                raise


async def watch(channel: grpc.aio.Channel, history: History) -> None:
    """Record every change until cancelled."""
    call = AdapterServiceStub(channel).WatchAdapters(pb.WatchAdaptersRequest())
    async for response in call:
        adapter = response.adapter
        if not response.snapshot_complete:
            state = pb.Adapter.State.Name(adapter.state).removeprefix("STATE_")
            name = adapter.name.removeprefix(NAME_PREFIX)
            history.changes.append(Change(time.monotonic(), name, adapter.generation, state))
