"""grpc.health.v1: "" says that the process lives, a service's name says that it takes calls."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

GENERATION_SERVICE = "fmaas.GenerationService"
ADAPTER_SERVICE = "graft.admin.v1.AdapterService"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """One health service for each port, flipped together."""

    def __init__(self) -> None:
        self.public = health_aio.HealthServicer()
        self.admin = health_aio.HealthServicer()

    async def set_alive(self, alive: bool) -> None:
        """Whether the process should go on living (false: the engine is dead)."""
        for servicer in (self.public, self.admin):
            await servicer.set("", _SERVING if alive else _NOT_SERVING)

    async def set_ready(self, ready: bool) -> None:
        """Whether new calls are taken: false while starting and draining."""
        status = _SERVING if ready else _NOT_SERVING
        await self.public.set(GENERATION_SERVICE, status)
        await self.admin.set(ADAPTER_SERVICE, status)
