"""The small HTTP port: /metrics for Prometheus, health for simple probes, /v1/models for routers. GET only."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST

from runtime.errors import GraftError
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate, ServerState
from runtime.server.health import Health
from runtime.server.metrics import Metrics

REQUEST_SECONDS = 5.0
MAX_HEADER_BYTES = 16 * 1024
JSON = "application/json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HttpResponse:
    """One answer; the connection closes after it."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK

    def encode(self) -> bytes:
        """The bytes on the wire."""
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + self.body


class HttpServer:
    """Answers four paths."""

    def __init__(self, client: EngineClient, gate: Gate, health: Health, metrics: Metrics, model_name: str) -> None:
        self._client = client
        self._gate = gate
        self._health = health
        self._metrics = metrics
        self._model_name = model_name
        self._server: asyncio.Server | None = None
        self._routes: dict[str, Callable[[], Awaitable[HttpResponse]]] = {
            "/metrics": self._get_metrics,
            "/healthz": self._get_healthz,
            "/readyz": self._get_readyz,
            "/v1/models": self._get_models,
        }

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which differs from the one asked for if that was 0."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_HEADER_BYTES)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                writer.write((await self._answer(reader)).encode())
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # the peer was too slow or is gone: there is nobody to tell
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> HttpResponse:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
        except (asyncio.LimitOverrunError, ValueError):
            return HttpResponse(b"bad request\n", status=HTTPStatus.BAD_REQUEST)
        route = self._routes.get(target.partition("?")[0])
        if route is None:
            return HttpResponse(b"not found\n", status=HTTPStatus.NOT_FOUND)
        if method != "GET":
            return HttpResponse(b"only GET is known here\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            return await route()
        except GraftError as error:
            return HttpResponse(f"{error.message}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)

    async def _get_metrics(self) -> HttpResponse:
        return HttpResponse(self._metrics.scrape(), CONTENT_TYPE_LATEST)

    async def _get_healthz(self) -> HttpResponse:
        return self._health_response(None)

    async def _get_readyz(self) -> HttpResponse:
        return self._health_response(self._gate.state)

    def _health_response(self, state: ServerState | None) -> HttpResponse:
        """503 with what is wrong; a `state` other than READY counts as that."""
        problem = ""
        if self._client.dead.done():
            problem = "engine stopped"
        elif not self._health.is_alive:
            problem = "engine stalled"
        elif state not in (None, ServerState.READY):
            problem = str(state).lower()
        status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
        return HttpResponse(f"{problem or 'ok'}\n".encode(), status=status)

    async def _get_models(self) -> HttpResponse:
        """The OpenAI list; adapters carry their base as `parent`, which LoRA-aware routers read."""
        adapters = await self._client.list_adapters()
        base = {
            "id": self._model_name,
            "object": "model",
            "owned_by": "graft",
            "parent": None,
            "max_model_len": self._client.ready.max_model_len,
        }
        entries = [
            {
                "id": adapter.name,
                "object": "model",
                "created": int(adapter.created),
                "owned_by": "graft",
                "parent": self._model_name,
            }
            for adapter in adapters
            if adapter.state in ("READY", "REGISTERED")
        ]
        return HttpResponse(json.dumps({"object": "list", "data": [base, *entries]}).encode(), JSON)
