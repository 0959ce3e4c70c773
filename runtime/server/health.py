"""grpc.health.v1: "" says that the process lives, a service's name says that it takes calls."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

GENERATION_SERVICE = "fmaas.GenerationService"
ADAPTER_SERVICE = "graft.admin.v1.AdapterService"
SERVER_SERVICE = "graft.admin.v1.ServerService"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """One health service for each port. It answers from what was last set here, and never asks the engine."""

    def __init__(self) -> None:
        self.public = health_aio.HealthServicer()
        self.admin = health_aio.HealthServicer()
        self.is_alive = True
        self._is_ready = False

    async def set_alive(self, alive: bool) -> None:
        """Whether the process should go on living (false: the engine is dead or stalled)."""
        self.is_alive = alive
        await self._tell()

    async def set_ready(self, ready: bool) -> None:
        """Whether new calls are taken: false while starting and draining."""
        self._is_ready = ready
        await self._tell()

    async def _tell(self) -> None:
        """Who is not alive is not ready; ServerService answers in every state."""
        alive = _SERVING if self.is_alive else _NOT_SERVING
        ready = _SERVING if self.is_alive and self._is_ready else _NOT_SERVING
        for servicer in (self.public, self.admin):
            await servicer.set("", alive)
        await self.admin.set(SERVER_SERVICE, alive)
        await self.admin.set(ADAPTER_SERVICE, ready)
        await self.public.set(GENERATION_SERVICE, ready)
