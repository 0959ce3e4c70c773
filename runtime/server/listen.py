"""How the gRPC ports are opened."""

from __future__ import annotations

import grpc

from runtime.config import ServerConfig
from runtime.errors import Precondition

CONNECTION_AGE_GRACE_SECONDS = 3600


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Settings of both ports.

    gRPC ignores misspelt names without a word, so a test looks each of them up in gRPC's own library. There is no
    `maximum_concurrent_rpcs`: it would refuse health checks too, so the engine's queue is the bound.
    """
    return [
        ("grpc.max_receive_message_length", config.max_receive_bytes),
        # Clients and gateways may ping every 10 s (gRPC's default of 300 s ends their connection, and all calls on it).
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
        # A peer that is gone is found in 80 s; a long prefill sends no data meanwhile.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Old connections are renewed, so that a load balancer of connections finds new replicas; calls on them go on.
        ("grpc.max_connection_age_ms", int(config.max_connection_age_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_SECONDS * 1000),
        # A second server on the same port is an error instead of a silent sharer.
        ("grpc.so_reuseport", 0),
    ]


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Take a port, and return the one that it became if 0 was asked for; raises Precondition."""
    try:
        bound: int = server.add_insecure_port(address(host, port))
    except RuntimeError as error:
        message = f"cannot listen on {address(host, port)}: is the port taken?"
        raise Precondition(message, reason="PORT_TAKEN") from error
    return bound


def address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
