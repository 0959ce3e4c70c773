"""Puts the front-end together: ports, services, the engine process, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loaders.tokenizer import Tokenizer
from runtime.adapters.info import AdapterInfo
from runtime.config import ServerConfig
from runtime.engine.process import DEFAULT_ENGINE
from runtime.errors import Precondition
from runtime.pb.fmaas import generation_pb2_grpc
from runtime.pb.graft.admin.v1 import adapters_pb2_grpc, server_pb2_grpc
from runtime.server.adapter_manifest import AdapterManifest
from runtime.server.adapter_quotas import AdapterQuotas
from runtime.server.adapter_root import AdapterRoot
from runtime.server.adapter_service import AdapterService
from runtime.server.drain import Drain
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate, ServerState
from runtime.server.generation import TextGenerator
from runtime.server.generation_service import GenerationService
from runtime.server.health import GENERATION_SERVICE, Health
from runtime.server.http import HttpServer
from runtime.server.interceptors import ErrorInterceptor
from runtime.server.limits import Limits
from runtime.server.listen import address, bind, channel_options
from runtime.server.metrics import Metrics
from runtime.server.output_stream import ReaderBounds
from runtime.server.server_service import ServerService
from runtime.server.stall import StallWatch

STOP_GRACE_SECONDS = 5.0

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
        bounds = ReaderBounds(config.max_queued_outputs, config.slow_reader_seconds)
        self._client = EngineClient(config.engine, engine_class, bounds)
        self._gate = Gate()
        self._health = Health()
        self._metrics = Metrics(
            config.model_name,
            lambda: self._client.stats,
            max_lora=config.engine.max_adapters,
            max_adapter_labels=config.metrics_max_adapters,
        )
        self._drain = Drain(self._gate, self._health, self._metrics)
        self._client.on_step = self._metrics.count_step
        self._client.on_adapters = self._update_adapters
        self._root = AdapterRoot(self._client, config.adapters_root if config.adapters_on_demand else None)
        quotas = AdapterQuotas(config.max_adapter_requests, config.max_adapter_tokens)
        self._generation = GenerationService(self._client, self._gate, quotas, self._root.register)
        self._service = ServerService(config, self._client, self._gate, self._health, self._drain)
        self._http = HttpServer(self._client, self._gate, self._health, self._metrics, config.model_name)
        self._watching: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        interceptors = [ErrorInterceptor(self._metrics)]
        options = channel_options(config)
        self._public = grpc.aio.server(interceptors=interceptors, options=options)
        self._admin = grpc.aio.server(interceptors=interceptors, options=options)

    async def start(self) -> Addresses:
        """Open the ports, start the engine, load the adapters of the command line, take calls."""
        _require_fast_protobuf()
        config = self._config
        self._add_services()
        await self._health.set_alive(True)
        await self._health.set_ready(False)
        grpc_port = bind(self._public, config.host, config.grpc_port)
        admin_port = bind(self._admin, config.admin_host, config.admin_port)
        await self._public.start()
        await self._admin.start()
        http_port = await self._http.start(config.host, config.http_port)
        loading = asyncio.to_thread(Tokenizer.from_dir, config.engine.model_path)
        ready, tokenizer = await asyncio.gather(self._client.start(), loading)
        self._metrics.set_max_model_len(ready.max_model_len)
        limits = Limits(ready.max_model_len, config.max_new_tokens_limit, config.default_max_new_tokens)
        self._generation.generator = TextGenerator(self._client, tokenizer, limits, self._metrics)
        self._service.limits = limits
        for name, path in config.adapters.items():
            await self._client.load_adapter(name, str(path.resolve()))
        if config.adapters_manifest is not None:
            manifest = AdapterManifest(
                self._client, config.adapters_manifest, config.adapters_root, self._metrics.count_manifest
            )
            await manifest.reconcile()
            self._following = asyncio.create_task(manifest.follow(), name="manifest")
        self._watching = asyncio.create_task(StallWatch(self._client, self._health, config.stall_seconds).run())
        self._gate.state = ServerState.READY
        await self._health.set_ready(True)
        return Addresses(
            address(config.host, grpc_port), address(config.admin_host, admin_port), address(config.host, http_port)
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
        await self._drain.begin()
        await self._drain.finish(self._config.drain_delay_seconds, self._config.drain_timeout_seconds, skip)

    async def stop(self) -> None:
        """Close the ports, end the engine. What is being sent has `STOP_GRACE_SECONDS` to arrive."""
        if self._client.dead.done():
            await self._health.set_alive(False)
        try:
            tasks = [task for task in (self._watching, self._following) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(self._public.stop(STOP_GRACE_SECONDS), self._admin.stop(STOP_GRACE_SECONDS))
            await self._http.stop()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        finally:
            await self._client.stop()

    def _update_adapters(self, adapters: list[AdapterInfo]) -> None:
        self._metrics.update_adapters(adapters)
        self._root.update(adapters)

    def _add_services(self) -> None:
        config = self._config
        adapters = AdapterService(
            self._client,
            self._gate,
            root=config.adapters_root,
            base_model=config.model_name,
            max_adapters=config.engine.max_adapters,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, self._public)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._admin)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self._service, self._admin)
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
        gc.freeze()  # what is there now stays: to look through it again and again holds up all streams
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


def _require_fast_protobuf() -> None:
    if api_implementation.Type() == "python":
        message = "protobuf runs in its pure-Python form, ten times slower; reinstall it for this platform"
        raise Precondition(message, reason="SLOW_PROTOBUF")
