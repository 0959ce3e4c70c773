"""Puts the front-end together: ports, services, the engine process, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loaders.tokenizer import Tokenizer
from runtime.config import ServerConfig
from runtime.engine.process import DEFAULT_ENGINE
from runtime.errors import Precondition, Unavailable
from runtime.pb.fmaas import generation_pb2_grpc
from runtime.pb.graft.admin.v1 import adapters_pb2_grpc
from runtime.server.adapter_service import AdapterService
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate, ServerState
from runtime.server.generation import TextGenerator
from runtime.server.generation_service import GenerationService
from runtime.server.health import GENERATION_SERVICE, Health
from runtime.server.http import HttpServer
from runtime.server.interceptors import ErrorInterceptor
from runtime.server.limits import Limits
from runtime.server.metrics import Metrics
from runtime.server.output_stream import ReaderBounds

STOP_GRACE_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Addresses:
    """Where the server listens, with the ports it got."""

    grpc: str
    admin: str
    http: str

    def __str__(self) -> str:
        return f"grpc {self.grpc}, admin {self.admin}, http {self.http}"


class Server:
    """One front-end and its engine process."""

    def __init__(self, config: ServerConfig, engine_class: str = DEFAULT_ENGINE) -> None:
        self._config = config
        self._model_name = config.engine.model_path.resolve().name
        bounds = ReaderBounds(config.max_queued_outputs, config.slow_reader_seconds)
        self._client = EngineClient(config.engine, engine_class, bounds)
        self._gate = Gate()
        self._health = Health()
        self._metrics = Metrics(self._model_name, lambda: self._client.stats)
        self._generation = GenerationService(self._client, self._gate)
        self._http = HttpServer(self._client, self._gate, self._metrics, self._model_name)
        interceptors = [ErrorInterceptor(self._metrics)]
        options = _channel_options(config)
        self._public = grpc.aio.server(interceptors=interceptors, options=options)
        self._admin = grpc.aio.server(interceptors=interceptors, options=options)

    async def start(self) -> Addresses:
        """Open the ports, start the engine, load the adapters of the command line, take calls."""
        _require_fast_protobuf()
        config = self._config
        self._add_services()
        await self._health.set_alive(True)
        await self._health.set_ready(False)
        grpc_port = _bind(self._public, config.host, config.grpc_port)
        admin_port = _bind(self._admin, config.admin_host, config.admin_port)
        await self._public.start()
        await self._admin.start()
        http_port = await self._http.start(config.host, config.http_port)
        loading = asyncio.to_thread(Tokenizer.from_dir, config.engine.model_path)
        ready, tokenizer = await asyncio.gather(self._client.start(), loading)
        limits = Limits(ready.max_model_len, config.max_new_tokens_limit, config.default_max_new_tokens)
        self._generation.generator = TextGenerator(self._client, tokenizer, limits, self._metrics)
        for name, path in config.adapters.items():
            await self._client.load_adapter(name, str(path.resolve()))
        self._gate.state = ServerState.READY
        await self._health.set_ready(True)
        return Addresses(
            _address(config.host, grpc_port), _address(config.admin_host, admin_port), _address(config.host, http_port)
        )

    async def wait_engine_dead(self) -> str:
        """Return, with the reason, when the engine process has ended by itself."""
        return await asyncio.shield(self._client.dead)

    @property
    def is_engine_dead(self) -> bool:
        """Whether the engine process has ended."""
        return self._client.dead.done()

    async def drain(self, skip: asyncio.Event) -> None:
        """Take no new calls; return when the running ones have ended, at the latest after the drain timeout."""
        self._gate.state = ServerState.DRAINING
        self._metrics.set_draining(True)
        await self._health.set_ready(False)
        logger.info("draining: %d calls are running", self._gate.num_inside)
        waits = [asyncio.create_task(self._gate.wait_empty()), asyncio.create_task(skip.wait())]
        try:
            await asyncio.wait(waits, timeout=self._config.drain_timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._gate.num_inside:
            logger.warning("ending %d calls that did not finish in time", self._gate.num_inside)
            self._client.fail_requests(Unavailable("the server stopped before the end", reason="DRAINING"))

    async def stop(self) -> None:
        """Close the ports, end the engine."""
        if self._client.dead.done():
            await self._health.set_alive(False)
            await self._health.set_ready(False)
        try:
            await asyncio.gather(self._public.stop(STOP_GRACE_SECONDS), self._admin.stop(STOP_GRACE_SECONDS))
            await self._http.stop()
        finally:
            await self._client.stop()

    def _add_services(self) -> None:
        config = self._config
        adapters = AdapterService(
            self._client,
            self._gate,
            root=config.adapters_root,
            base_model=self._model_name,
            max_adapters=config.engine.max_adapters,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, self._public)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._admin)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.public, self._public)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.admin, self._admin)
        reflection.enable_server_reflection(
            (GENERATION_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._public
        )


async def serve(
    config: ServerConfig, *, on_ready: Callable[[Addresses], None], engine_class: str = DEFAULT_ENGINE
) -> int:
    """Serve until SIGTERM or SIGINT (exit 0 after draining; a second signal skips that) or the engine's death (1)."""
    config.validate()
    stop, skip = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (skip if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = Server(config, engine_class)
    try:
        starting = asyncio.create_task(server.start())
        if not await _first(starting, asyncio.create_task(stop.wait())):
            return 0
        on_ready(starting.result())
        dying = asyncio.create_task(server.wait_engine_dead())
        if await _first(dying, asyncio.create_task(stop.wait())):
            logger.error("the engine stopped: %s", dying.result())
            return 1
        await server.drain(skip)
        return 1 if server.is_engine_dead else 0
    finally:
        await server.stop()


async def _first(task: asyncio.Task[object], other: asyncio.Task[bool]) -> bool:
    """Whether `task` was done first; the one that was not is cancelled."""
    await asyncio.wait((task, other), return_when=asyncio.FIRST_COMPLETED)
    is_first = task.done()
    loser = other if is_first else task
    loser.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loser
    return is_first


def _channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Misspelt keys are ignored by gRPC without a word, so these are copied from its own headers."""
    return [
        ("grpc.max_receive_message_length", config.max_receive_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
    ]


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    try:
        bound: int = server.add_insecure_port(_address(host, port))
    except RuntimeError as error:
        message = f"cannot listen on {_address(host, port)}: is the port taken?"
        raise Precondition(message, reason="PORT_TAKEN") from error
    return bound


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _require_fast_protobuf() -> None:
    if api_implementation.Type() == "python":
        message = "protobuf runs in its pure-Python form, ten times slower; reinstall it for this platform"
        raise Precondition(message, reason="SLOW_PROTOBUF")
