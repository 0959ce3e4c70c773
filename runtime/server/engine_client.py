"""The front-end's view of the engine process: start it, send commands, hand each event to whoever waits for it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from runtime.config import EngineConfig
from runtime.engine.messages import (
    AdapterCall,
    AdapterChanged,
    AdapterInfo,
    AdapterReply,
    AddRequest,
    AliasChanged,
    AliasInfo,
    AliasReply,
    CallFailed,
    CallId,
    CancelRequest,
    Command,
    EngineFailed,
    EngineReady,
    EngineStats,
    ListAdapters,
    LoadAdapter,
    PauseRequest,
    PromptScored,
    RequestAccepted,
    RequestFailed,
    RequestId,
    Shutdown,
    StepOutputs,
)
from runtime.engine.process import DEFAULT_ENGINE
from runtime.engine.sampling_params import SamplingParams
from runtime.engine.transport import TransportError, encode, receive
from runtime.env import engine_environment
from runtime.errors import GraftError, Internal, Unavailable, error_of_kind
from runtime.server.adapter_watch import AdapterWatch
from runtime.server.output_stream import OutputStream, ReaderBounds

STOP_SECONDS = 10.0

logger = logging.getLogger(__name__)


class EngineClient:
    """Owns the engine process and everything that waits for it."""

    def __init__(
        self, config: EngineConfig, engine_class: str = DEFAULT_ENGINE, reader_bounds: ReaderBounds | None = None
    ) -> None:
        self.stats = EngineStats()
        self.on_step: Callable[[EngineStats], None] = _ignore
        self.on_adapters: Callable[[list[AdapterInfo]], None] = _ignore
        self.dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._config = config
        self._engine_class = engine_class
        self._reader_bounds = reader_bounds or ReaderBounds()
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._streams: dict[RequestId, OutputStream] = {}
        self._calls: dict[CallId, asyncio.Future[AdapterReply | AliasReply]] = {}
        self._watches: dict[CallId, AdapterWatch] = {}
        self._aliases: dict[str, str] = {}
        self._ids = itertools.count(1)
        self._is_unheard = False
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> EngineReady:
        """Start the process and wait until it can serve; raises Internal with the engine's own reason if it cannot."""
        ours, theirs = socket.socketpair()
        command = (sys.executable, "-m", "runtime.engine.process", str(theirs.fileno()), self._engine_class)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], env=engine_environment()
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._writer.write(encode(self._config))
        self._reading = asyncio.create_task(self._read_events(reader), name="engine-events")
        return await asyncio.shield(self._ready)

    @property
    def ready(self) -> EngineReady:
        """What the engine said when it came up; raises Unavailable before that."""
        if not self._ready.done():
            raise Unavailable("the engine is starting", reason="STARTING", retry_seconds=1.0)
        return self._ready.result()

    @property
    def is_busy(self) -> bool:
        """Whether the engine has, or should have by now, a request to compute for."""
        return self.stats.running > self.stats.paused or self._is_unheard

    def adapter_named(self, reference: str) -> str:
        """The adapter that NAME, ALIAS or NAME@GENERATION means, as far as the engine has told of its aliases."""
        name = reference.partition("@")[0]
        return self._aliases.get(name, name)

    def add(
        self, prompt_ids: list[int], params: SamplingParams, adapter: str | None, deadline: float | None
    ) -> OutputStream:
        """Start a request; its outputs come through the stream, which must be closed."""
        request_id = RequestId(next(self._ids))
        self._send(AddRequest(request_id, prompt_ids, params, adapter, deadline))
        self._is_unheard = True
        stream = self._streams[request_id] = OutputStream(request_id, self, self._reader_bounds)
        return stream

    def pause(self, stream: OutputStream, paused: bool) -> None:
        """For a stream of ours: keep its request out of the coming steps, or let it go on."""
        if not self.dead.done():
            self._send(PauseRequest(stream.request_id, paused))

    def forget(self, stream: OutputStream) -> None:
        """For a stream of ours: send it nothing more, and free its request if that still runs."""
        if self._streams.pop(stream.request_id, None) and not stream.ended and not self.dead.done():
            self._send(CancelRequest(stream.request_id))

    async def load_adapter(self, name: str, path: str, expected_digest: str = "") -> AdapterInfo:
        """Load a folder under a name; returns when requests may name it."""
        return (await self.adapters(partial(LoadAdapter, name=name, path=path, expected_digest=expected_digest)))[0]

    async def list_adapters(self, name: str = "") -> list[AdapterInfo]:
        """All generations by name and age, or the named adapter; raises NotFound."""
        return await self.adapters(partial(ListAdapters, name=name))

    async def adapters(self, make: Callable[[CallId], AdapterCall]) -> list[AdapterInfo]:
        """The engine's answer to a call about adapters."""
        reply = await self._call(make(CallId(next(self._ids))))
        if not isinstance(reply, AdapterReply):
            raise TransportError(f"an engine does not answer so: {type(reply).__name__}")
        return reply.adapters

    async def aliases(self, make: Callable[[CallId], AdapterCall]) -> list[AliasInfo]:
        """The engine's answer to a call about aliases."""
        reply = await self._call(make(CallId(next(self._ids))))
        if not isinstance(reply, AliasReply):
            raise TransportError(f"an engine does not answer so: {type(reply).__name__}")
        return reply.aliases

    async def _call(self, command: AdapterCall) -> AdapterReply | AliasReply:
        future: asyncio.Future[AdapterReply | AliasReply] = asyncio.get_running_loop().create_future()
        self._calls[command.call_id] = future
        try:
            self._send(command)
            return await future
        finally:
            self._calls.pop(command.call_id, None)

    @contextmanager
    def watch_adapters(self, watch: AdapterWatch) -> Iterator[None]:
        """Feed a watch: all adapters as they are at one moment, and every change after it."""
        call_id = CallId(next(self._ids))
        self._watches[call_id] = watch
        try:
            self._send(ListAdapters(call_id))
            yield
        finally:
            del self._watches[call_id]

    def fail_requests(self, error: GraftError) -> None:
        """End every running request with an error."""
        for stream in list(self._streams.values()):
            stream.fail(error)
            stream.close()

    async def stop(self) -> None:
        """End the process after its current step, by force if it does not answer."""
        if self._process is None:
            return
        if self._writer is not None and not self.dead.done():
            self._writer.write(encode(Shutdown()))
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            logger.warning("the engine did not stop within %.0f s; killing it", STOP_SECONDS)
            self._process.kill()
            await self._process.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
            if self._reading is not None:
                await self._reading

    def _send(self, command: Command) -> None:
        if self.dead.done():
            raise Unavailable("the engine has stopped", reason="ENGINE_STOPPED")
        if self._writer is None or not self._ready.done():
            raise Unavailable("the engine is starting", reason="STARTING", retry_seconds=1.0)
        self._writer.write(encode(command))

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        """Supervises the process: its events until it ends, and then an error for everything that still waits."""
        reason = "the engine process ended"
        try:
            while (event := await receive(reader)) is not None:
                if isinstance(event, EngineFailed):
                    reason = event.message
                else:
                    self._dispatch(event)
        except TransportError:
            logger.exception("the engine sent what is not a message")
        finally:
            self._die(reason)

    def _dispatch(self, event: object) -> None:
        self._is_unheard = False
        match event:
            case StepOutputs(outputs, stats):
                self.stats = stats
                self.on_step(stats)
                for output in outputs:
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream.push(output)
            case RequestFailed(request_id, kind, message, reason, field, seconds):
                if (stream := self._streams.get(request_id)) is not None:
                    error = error_of_kind(kind, message, reason=reason, field=field, retry_seconds=seconds)
                    stream.fail(error)
            case PromptScored(request_id):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.push_scores(event)
            case RequestAccepted(request_id, label=label):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.adapter = label
            case AdapterChanged(adapter):
                self.on_adapters([adapter])
                for watch in self._watches.values():
                    watch.change(adapter)
            case AdapterReply(call_id, adapters) if (watched := self._watches.get(call_id)) is not None:
                watched.begin(adapters)
            case AdapterReply(call_id) | AliasReply(call_id):
                if (future := self._calls.get(call_id)) is not None and not future.done():
                    future.set_result(event)
            case AliasChanged(alias):
                self._aliases[alias.alias] = alias.adapter
                if not alias.adapter:
                    del self._aliases[alias.alias]
            case CallFailed(call_id, kind, message, reason, field, problems, seconds):
                error = error_of_kind(
                    kind, message, reason=reason, field=field, problems=problems, retry_seconds=seconds
                )
                if (future := self._calls.get(call_id)) is not None and not future.done():
                    future.set_exception(error)
                else:
                    logger.warning("an adapter call failed after its caller had gone: %s", message)
            case EngineReady():
                self._ready.set_result(event)
            case _:
                raise TransportError(f"an engine does not send {type(event).__name__}")

    def _die(self, reason: str) -> None:
        error = Internal("the engine stopped while the request ran", reason="ENGINE_STOPPED")
        self.dead.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(Internal(f"the engine did not start: {reason}", reason="ENGINE_START_FAILED"))
            self._ready.exception()  # seen: nobody may be waiting any more
        self.fail_requests(error)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        for watch in self._watches.values():
            watch.end(error)


def _ignore(_: object) -> None:
    """Until somebody wants to know."""
