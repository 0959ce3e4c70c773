"""`graft.admin.v1.ServerService`: what the server is, how busy it is, taking it out of traffic, ending requests."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from google.protobuf import duration_pb2

from runtime.adapters.expression import names
from runtime.config import DAY_SECONDS, ServerConfig
from runtime.errors import Aborted, InvalidRequest, Unavailable
from runtime.pb.graft.admin.v1 import server_pb2 as pb
from runtime.pb.graft.admin.v1 import server_pb2_grpc as pb_grpc
from runtime.server.calls import Call
from runtime.server.drain import Drain
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate, ServerState
from runtime.server.health import Health
from runtime.server.limits import Limits
from runtime.version import version

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

logger = logging.getLogger(__name__)


class ServerService(pb_grpc.ServerServiceServicer):
    """The operator's RPCs about the server as a whole. `limits` is set when the engine is ready."""

    def __init__(self, config: ServerConfig, client: EngineClient, gate: Gate, health: Health, drain: Drain) -> None:
        self.limits: Limits | None = None
        self._config = config
        self._client = client
        self._gate = gate
        self._health = health
        self._drain = drain
        self._started = time.time()

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """What runs here, in which state, with which limits; answered in every state."""
        engine = self._config.engine
        info = pb.GetServerInfoResponse(
            version=version(),
            model_name=self._config.model_name,
            state=f"STATE_{self._gate.state}",
            stalled=not self._health.is_alive,
            device=engine.device,
            max_waiting_requests=engine.max_waiting_requests,
            max_receive_bytes=self._config.max_receive_bytes,
            max_adapter_requests=self._config.max_adapter_requests,
            max_adapter_tokens=self._config.max_adapter_tokens,
            replacement_experts=engine.replacement_experts,
        )
        info.start_time.FromMicroseconds(int(self._started * 1e6))
        if self.limits is not None:
            ready = self._client.ready
            info.model_kind, info.dtype, info.parameter_count = ready.model_kind, ready.dtype, ready.num_parameters
            info.limits.CopyFrom(pb.Limits(**dataclasses.asdict(self.limits)))
        return info

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        """How busy the engine is, and one page of the calls inside, the oldest first."""
        size = request.page_size or DEFAULT_PAGE_SIZE
        if not 1 <= size <= MAX_PAGE_SIZE:
            raise _invalid("page_size", f"page_size = {size} is out of range: 0 (default)..{MAX_PAGE_SIZE}")
        after = _serial_of(request.page_token)
        stats, calls = self._client.stats, self._gate.calls
        rest = [call for call in calls if call.serial > after]
        return pb.GetLoadResponse(
            sequences_running=stats.running,
            sequences_waiting=stats.waiting,
            sequences_paused=stats.paused,
            kv_tokens_used=stats.kv_tokens_used,
            kv_tokens_total=stats.kv_tokens_total,
            adapter_bytes_used=stats.adapter_device_bytes,
            adapter_bytes_limit=self._client.ready.adapter_bytes_limit,
            estimated_wait=_duration(stats.estimated_wait_seconds),
            step_count=stats.steps,
            draining=self._gate.state is ServerState.DRAINING,
            request_count=len(calls),
            requests=[_running_request(call) for call in rest[:size]],
            next_page_token=str(rest[size - 1].serial) if len(rest) > size else "",
        )

    async def Drain(self, request: pb.DrainRequest, context: Context) -> AsyncIterator[pb.DrainResponse]:
        """Take no new calls, and tell how many still run until none does."""
        timeout_seconds = self._config.drain_timeout_seconds
        if request.HasField("timeout"):
            timeout_seconds = request.timeout.seconds + request.timeout.nanos / 1e9
        if not 0 <= timeout_seconds <= DAY_SECONDS:
            raise _invalid("timeout", f"timeout = {timeout_seconds:g} s is out of range: 0..{DAY_SECONDS} s")
        if self._gate.state is ServerState.STARTING:
            raise Unavailable("the server is starting: there is nothing to drain", reason="STARTING", retry_seconds=1.0)
        phase = pb.DrainResponse.PHASE_STARTED if await self._drain.begin() else pb.DrainResponse.PHASE_IN_PROGRESS
        yield pb.DrainResponse(phase=phase, running_request_count=self._gate.num_inside)
        is_first = True
        async for num_running in self._drain.watch(timeout_seconds):
            if not is_first:
                yield pb.DrainResponse(phase=pb.DrainResponse.PHASE_IN_PROGRESS, running_request_count=num_running)
            is_first = False
        yield pb.DrainResponse(phase=pb.DrainResponse.PHASE_COMPLETE)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """End the calls that the target names."""
        target = request.WhichOneof("target")
        if target is None or not getattr(request, target):
            message = "name what to end: request_id, correlation_id, adapter_id, or all = true"
            raise _invalid(target or "target", message)
        calls = [call for call in self._gate.calls if _is_meant(call, request)]
        error = Aborted("an operator ended this request", reason="ABORTED_BY_OPERATOR")
        num_ended = sum([call.end(error) for call in calls])
        logger.info("an operator ended %d calls, by %s %r", num_ended, target, getattr(request, target))
        return pb.AbortResponse(aborted_count=num_ended)


def _is_meant(call: Call, request: pb.AbortRequest) -> bool:
    match request.WhichOneof("target"):
        case "request_id":
            return call.request_id == request.request_id
        case "correlation_id":
            return call.correlation_id == request.correlation_id
        case "adapter_id":
            return names(call.adapter, request.adapter_id)
        case _:
            return request.all


def _running_request(call: Call) -> pb.RunningRequest:
    return pb.RunningRequest(
        request_id=call.request_id,
        correlation_id=call.correlation_id,
        adapter_id=call.adapter,
        age=_duration(time.monotonic() - call.started),
        sequence_count=len(call.streams),
        generated_token_count=call.num_tokens,
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(int(seconds * 1e6))
    return duration


def _serial_of(page_token: str) -> int:
    if page_token and not (page_token.isascii() and page_token.isdecimal() and len(page_token) < 20):
        raise _invalid("page_token", "page_token is not one that this server gave out")
    return int(page_token or 0)


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_PARAMETER", field=field)
