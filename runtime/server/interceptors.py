"""Around every RPC of ours: what is raised inside becomes a gRPC status, and failures are counted."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from runtime.errors import GraftError, Internal
from runtime.server.metrics import Metrics
from runtime.server.status import abort, code_of

OUR_PACKAGES = ("/fmaas.", "/graft.")
ABORT_SECONDS = 1.0
REQUESTS = "/fmaas."
TEXT_REQUESTS = "/fmaas.GenerationService/Generate"  # and GenerateStream

logger = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Maps GraftError to its status; anything else is INTERNAL with an id that stands in the log beside the trace."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handlers of our own services; health and reflection speak for themselves."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OUR_PACKAGES):
            return handler
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._wrap_stream(handler.unary_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._wrap_unary(handler.unary_unary, method), handler.request_deserializer, handler.response_serializer
        )

    def _wrap_unary(self, inner: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            try:
                return await inner(request, context)
            except asyncio.CancelledError:
                self._count(method, "CANCELLED", "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001  # the border: every error becomes a status
                await abort(context, self._as_graft_error(error, method))

        return call

    def _wrap_stream(self, inner: Any, method: str) -> Any:
        """Writes what the service yields: one layer less for each message, and a cancelled write is met here."""

        async def call(request: Any, context: Any) -> None:
            responses = inner(request, context)
            try:
                try:
                    async for response in responses:
                        # All streams of a step make their messages before the first one is sent: Python code that
                        # is not interrupted by system calls runs in warm caches, which saves a seventh of the whole.
                        await asyncio.sleep(0)
                        await context.write(response)
                finally:
                    await responses.aclose()  # raises why the service had the write cancelled, if it had
            except asyncio.CancelledError:
                self._count(method, "CANCELLED", "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001  # the border: every error becomes a status
                await _abort_stream(context, self._as_graft_error(error, method))

        return call

    def _as_graft_error(self, error: Exception, method: str) -> GraftError:
        if not isinstance(error, GraftError):
            error_id = uuid.uuid4().hex[:12]
            logger.error("%s failed, error %s", method, error_id, exc_info=error)
            error = Internal(f"internal error {error_id}; the server's log has the details", reason="INTERNAL")
        self._count(method, code_of(error.kind).name, error.reason)
        return error

    def _count(self, method: str, code: str, reason: str) -> None:
        """Calls of operators are no requests."""
        if method.startswith(REQUESTS):
            self._metrics.count_failure(code, reason)
        if method.startswith(TEXT_REQUESTS):
            self._metrics.count_rejection(reason)


async def _abort_stream(context: Any, error: GraftError) -> None:
    """Send the status. It waits in gRPC behind what the client has not read; who reads nothing is not waited for."""
    try:
        async with asyncio.timeout(ABORT_SECONDS):
            await abort(context, error)
    except TimeoutError:
        logger.info("a client that does not read was left with its status %s", error.reason)
