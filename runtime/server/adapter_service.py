"""`graft.admin.v1.AdapterService`: load, replace, pin, watch and unload adapters while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from runtime.adapters.expression import ADAPTER_ID, parse_expression
from runtime.engine.messages import ListAliases, LoadAdapter, PinAdapter, SetAlias, UnloadAdapter
from runtime.errors import GraftError
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2_grpc as pb_grpc
from runtime.server.adapter_resource import NAME_PREFIX, adapter_resource, page_of
from runtime.server.adapter_watch import AdapterWatch
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate
from runtime.server.paths import resolve_source_path
from runtime.server.refusal import invalid

MAX_REQUEST_ID_CHARS = 128

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdapterService(pb_grpc.AdapterServiceServicer):
    """The operator's RPCs."""

    def __init__(
        self, client: EngineClient, gate: Gate, *, root: Path | None, base_model: str, max_adapters: int
    ) -> None:
        self._client = client
        self._gate = gate
        self._root = root
        self._max_adapters = max_adapters
        self._resource = partial(adapter_resource, root=root, base_model=base_model)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        """Load, replace, register or only check a folder under the adapters root."""
        self._gate.check()
        name = _checked_id(request.adapter_id, "adapter_id")
        _check_load(request)
        folder = resolve_source_path(self._root, request.source_path)
        command = partial(
            LoadAdapter,
            name=name,
            path=str(folder),
            expected_digest=request.expected_digest,
            replace=request.replace,
            expected_generation=request.expected_generation,
            validate_only=request.validate_only,
            pinned=request.pinned,
            lazy=request.lazy,
            request_id=request.request_id,
        )
        with _errors_about("adapter_id"), _operator_paths(str(folder), request.source_path):
            (info,) = await self._client.adapters(command)
        return pb.LoadAdapterResponse(adapter=self._resource(info), already_loaded=info.already_loaded)

    async def ComposeAdapter(self, request: pb.ComposeAdapterRequest, context: Context) -> pb.ComposeAdapterResponse:
        """Give a weighted sum of adapters a name."""
        self._gate.check()
        name = _checked_id(request.adapter_id, "adapter_id")
        parse_expression(request.expression, "expression")
        _check_load(request)
        command = partial(
            LoadAdapter,
            name=name,
            expression=request.expression,
            replace=request.replace,
            expected_generation=request.expected_generation,
            validate_only=request.validate_only,
            pinned=request.pinned,
            request_id=request.request_id,
        )
        with _errors_about("expression"):
            (info,) = await self._client.adapters(command)
        return pb.ComposeAdapterResponse(adapter=self._resource(info), already_loaded=info.already_loaded)

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        """Take no new requests for it and free it when the running ones have ended."""
        self._gate.check()
        timeout = request.drain_timeout.ToTimedelta().total_seconds() if request.HasField("drain_timeout") else None
        if timeout is not None and timeout < 0:
            raise invalid("INVALID_PARAMETER", "drain_timeout", f"drain_timeout = {timeout} s is out of range: >= 0")
        command = partial(
            UnloadAdapter,
            name=_id_of(request.name),
            allow_missing=request.allow_missing,
            expected_generation=_checked_generation(request.expected_generation),
            drain_seconds=timeout,
            force=request.force,
        )
        with _errors_about("name"):
            infos = await self._client.adapters(command)
        if not infos:
            return pb.UnloadAdapterResponse()
        return pb.UnloadAdapterResponse(
            adapter=self._resource(infos[0]),
            bytes_device_freed=infos[0].freed_device_bytes,
            bytes_host_freed=infos[0].freed_host_bytes,
        )

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """One adapter by name, alias or generation."""
        with _errors_about("name"):
            (info,) = await self._client.list_adapters(_reference_of(request.name))
        return pb.GetAdapterResponse(adapter=self._resource(info))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """One page of adapters in the order of their names, and what all of them use."""
        everything = await self._client.list_adapters()
        page, next_token = page_of(everything, request)
        on_device = [adapter for adapter in everything if adapter.slot >= 0]
        return pb.ListAdaptersResponse(
            adapters=[self._resource(info) for info in page],
            next_page_token=next_token,
            slots_used=len(on_device),
            slots_total=self._max_adapters,
            bytes_used=sum(adapter.device_bytes for adapter in on_device),
            bytes_limit=self._client.ready.adapter_bytes_limit,
            bytes_host_used=sum(adapter.host_bytes for adapter in everything),
            bytes_host_limit=self._client.ready.adapter_host_bytes_limit,
        )

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        """A snapshot, and then every change in order until the server ends or the watcher falls behind."""
        watch = AdapterWatch()
        with self._client.watch_adapters(watch):
            try:
                while True:
                    info = await watch.take()
                    if info is None:
                        yield pb.WatchAdaptersResponse(snapshot_complete=True)
                    else:
                        yield pb.WatchAdaptersResponse(adapter=self._resource(info))
            except (asyncio.CancelledError, GeneratorExit):
                watch.raise_if_lost()
                raise

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        """Keep it on the device."""
        return pb.PinAdapterResponse(adapter=await self._pin(request.name, True))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.UnpinAdapterResponse:
        """Let it go when others need its place."""
        return pb.UnpinAdapterResponse(adapter=await self._pin(request.name, False))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Let an alias stand for another adapter from now on."""
        self._gate.check()
        alias = _checked_id(request.alias, "alias")
        adapter = _checked_id(request.adapter_id, "adapter_id")
        with _errors_about("adapter_id"):
            (told,) = await self._client.aliases(partial(SetAlias, alias=alias, adapter=adapter))
        return pb.SetAliasResponse(alias=pb.Alias(alias=told.alias, adapter_id=told.adapter))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """Forget an alias."""
        self._gate.check()
        await self._client.aliases(partial(SetAlias, alias=_checked_id(request.alias, "alias"), adapter=""))
        return pb.DeleteAliasResponse()

    async def ListAliases(self, request: pb.ListAliasesRequest, context: Context) -> pb.ListAliasesResponse:
        """All aliases by name."""
        told = await self._client.aliases(ListAliases)
        return pb.ListAliasesResponse(
            aliases=[pb.Alias(alias=item.alias, adapter_id=item.adapter) for item in told]
        )

    async def _pin(self, name: str, pinned: bool) -> pb.Adapter:
        self._gate.check()
        with _errors_about("name"):
            (info,) = await self._client.adapters(partial(PinAdapter, name=_id_of(name), pinned=pinned))
        return self._resource(info)


@contextmanager
def _errors_about(field: str) -> Iterator[None]:
    """The engine knows names, not which field of the request held them."""
    try:
        yield
    except GraftError as error:
        error.field = error.field or field
        raise


@contextmanager
def _operator_paths(folder: str, source_path: str) -> Iterator[None]:
    """Errors speak of the path that the operator named, not of the server's folders."""
    try:
        yield
    except GraftError as error:
        error.message = error.message.replace(folder, source_path)
        error.problems = tuple(problem.replace(folder, source_path) for problem in error.problems)
        raise


def _check_load(request: pb.LoadAdapterRequest | pb.ComposeAdapterRequest) -> None:
    _checked_generation(request.expected_generation)
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        message = f"request_id has {len(request.request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed"
        raise invalid("INVALID_PARAMETER", "request_id", message)
    if isinstance(request, pb.ComposeAdapterRequest):
        return
    for field in ("pinned", "validate_only"):
        if request.lazy and getattr(request, field):
            message = f"lazy and {field} exclude each other: what is only registered is not read yet"
            raise invalid("INVALID_PARAMETER", field, message)


def _checked_generation(generation: int) -> int:
    if generation < 0:
        message = f"expected_generation = {generation} is out of range: 0 (not checked) or a generation"
        raise invalid("INVALID_PARAMETER", "expected_generation", message)
    return generation


def _checked_id(adapter_id: str, field: str) -> str:
    if not ADAPTER_ID.fullmatch(adapter_id):
        message = f"{field} {adapter_id[:80]!r} must match {ADAPTER_ID.pattern}"
        raise invalid("ADAPTER_ID_INVALID", field, message)
    return adapter_id


def _id_of(name: str) -> str:
    return _checked_id(name.removeprefix(NAME_PREFIX), "name")


def _reference_of(name: str) -> str:
    reference = name.removeprefix(NAME_PREFIX)
    parse_expression(reference, "name")
    return reference
