"""`graft.admin.v1.AdapterService`: load, unload and look at adapters while requests run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.errors import GraftError, InvalidRequest
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2_grpc as pb_grpc
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate
from runtime.server.limits import ADAPTER_ID
from runtime.server.paths import display_path, resolve_source_path

NAME_PREFIX = "adapters/"
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdapterService(pb_grpc.AdapterServiceServicer):
    """The operator's RPCs; fields whose meaning is still to come are refused by name."""

    def __init__(
        self, client: EngineClient, gate: Gate, *, root: Path | None, base_model: str, max_adapters: int
    ) -> None:
        self._client = client
        self._gate = gate
        self._root = root
        self._base_model = base_model
        self._max_adapters = max_adapters

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        """Load a folder under the adapters root."""
        self._gate.check()
        _refuse_set(request, ("pinned", "replace", "expected_generation", "validate_only", "request_id"))
        name = _checked_id(request.adapter_id, "adapter_id")
        folder = resolve_source_path(self._root, request.source_path)
        with _errors_about("adapter_id"), _operator_paths(str(folder), request.source_path):
            info = await self._client.load_adapter(name, str(folder), request.expected_digest)
        return pb.LoadAdapterResponse(adapter=self._resource(info), already_loaded=info.already_loaded)

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        """Take no new requests for it and free it when the running ones have ended."""
        self._gate.check()
        _refuse_set(request, ("expected_generation", "drain_timeout", "force"))
        with _errors_about("name"):
            info = await self._client.unload_adapter(_id_of(request.name), request.allow_missing)
        return pb.UnloadAdapterResponse(adapter=None if info is None else self._resource(info))

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """One adapter by name."""
        with _errors_about("name"):
            (info,) = await self._client.list_adapters(_id_of(request.name))
        return pb.GetAdapterResponse(adapter=self._resource(info))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """One page of adapters in the order of their names, and what all of them use."""
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            message = f"page_size = {request.page_size} is out of range: 0 (default)..{MAX_PAGE_SIZE}"
            raise InvalidRequest(message, reason="INVALID_PARAMETER", field="page_size")
        everything = await self._client.list_adapters()
        if request.state not in pb.Adapter.State.values():
            message = f"state = {request.state} is not one of {', '.join(pb.Adapter.State.keys())}"
            raise InvalidRequest(message, reason="INVALID_PARAMETER", field="state")
        state = pb.Adapter.State.Name(request.state).removeprefix("STATE_") if request.state else None
        wanted = [a for a in everything if a.name > request.page_token and state in (None, a.state)]
        page = wanted[: request.page_size or DEFAULT_PAGE_SIZE]
        taken = [adapter for adapter in everything if adapter.slot >= 0]
        return pb.ListAdaptersResponse(
            adapters=[self._resource(info) for info in page],
            next_page_token=page[-1].name if len(page) < len(wanted) else "",
            slots_used=len(taken),
            slots_total=self._max_adapters,
            bytes_used=sum(adapter.device_bytes for adapter in taken),
            bytes_limit=self._client.ready.adapter_bytes_limit,
        )

    def _resource(self, info: AdapterInfo) -> pb.Adapter:
        on_device = info.state in (AdapterState.READY, AdapterState.DRAINING)
        adapter = pb.Adapter(
            name=NAME_PREFIX + info.name,
            generation=info.generation,
            digest=info.digest,
            state=f"STATE_{info.state}",
            placement=pb.Adapter.PLACEMENT_DEVICE if on_device else pb.Adapter.PLACEMENT_HOST,
            device_slots=[info.slot] if on_device else [],
            bytes_host=info.host_bytes,
            bytes_device=info.device_bytes,
            bytes_tensors=info.tensor_bytes,
            rank=info.lora_rank_max,
            target_modules=info.target_modules,
            expert_count=info.num_expert_pages,
            base_model=self._base_model,
            inflight_requests=info.num_running,
            source_path=display_path(self._root, info.source_path),
            warnings=info.warnings,
        )
        if info.last_used:
            adapter.last_used_time.FromMicroseconds(int(info.last_used * 1e6))
        if info.created:
            adapter.create_time.FromMicroseconds(int(info.created * 1e6))
        adapter.load_time.FromMicroseconds(int(info.load_seconds * 1e6))
        return adapter


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


def _refuse_set(request: Message, names: tuple[str, ...]) -> None:
    for descriptor, _ in request.ListFields():
        if descriptor.name in names:
            message = f"{descriptor.name} is not supported yet"
            raise InvalidRequest(message, reason="UNSUPPORTED_PARAMETER", field=descriptor.name)


def _checked_id(adapter_id: str, field: str) -> str:
    if not ADAPTER_ID.fullmatch(adapter_id):
        message = f"{field} {adapter_id[:80]!r} must match {ADAPTER_ID.pattern}"
        raise InvalidRequest(message, reason="ADAPTER_ID_INVALID", field=field)
    return adapter_id


def _id_of(name: str) -> str:
    return _checked_id(name.removeprefix(NAME_PREFIX), "name")
