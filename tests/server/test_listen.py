"""How the ports are opened: the names and values of gRPC's settings, and what they do."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from runtime.config import EngineConfig, ServerConfig
from runtime.server.listen import address, channel_options
from tests.server.live import DEMO_MODEL, LiveServer

CONFIG = ServerConfig(EngineConfig(DEMO_MODEL))


def test_grpc_knows_every_setting_by_the_name_that_is_used() -> None:
    """It ignores unknown names, so each is looked up among the strings of its own library."""
    library = Path(cygrpc.__file__).read_bytes()
    names = [name for name, _ in channel_options(CONFIG)]
    assert len(names) == len(set(names)) == 9
    assert [name for name in names if name.encode() + b"\0" not in library] == []
    assert b"grpc.http2.min_recv_ping_interval_without_data_ms\0" not in library, "the well-known misspelling"


def test_the_settings_have_the_stated_values() -> None:
    assert dict(channel_options(CONFIG)) == {
        "grpc.max_receive_message_length": 16 * 2**20,
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        "grpc.http2.max_ping_strikes": 5,
        "grpc.keepalive_time_ms": 60_000,
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.max_connection_age_ms": 1_800_000,
        "grpc.max_connection_age_grace_ms": 3_600_000,
        "grpc.so_reuseport": 0,
    }


@pytest.mark.parametrize("port", ["grpc_port", "admin_port"])
def test_a_second_server_on_a_port_in_use_does_not_start(server: LiveServer, adapters_root: Path, port: str) -> None:
    taken = server.address if port == "grpc_port" else server.admin_address
    with pytest.raises(RuntimeError, match=f"cannot listen on {taken}: is the port taken"):
        LiveServer.fake(adapters_root, f"{port}={taken.rsplit(':', 1)[1]}").__enter__()
    assert server.generate("abc").text == "abc"


def test_a_connection_is_renewed_at_its_age_and_the_calls_on_it_go_on(adapters_root: Path) -> None:
    with LiveServer.fake(adapters_root, "max_connection_age_seconds=1.0", step_seconds=0.01) as live:
        is_idle = threading.Event()
        live.channel.subscribe(lambda state: state is grpc.ChannelConnectivity.IDLE and is_idle.set())
        is_idle.clear()
        call = live.stream("abc", stopping={"max_new_tokens": 200, "min_new_tokens": 200})
        assert list(call)[-1].generated_token_count == 200
        assert is_idle.wait(5), "the server has not closed the connection"
        assert live.generate("abc").text == "abc"


@pytest.mark.parametrize(("host", "text"), [("127.0.0.1", "127.0.0.1:1"), ("::1", "[::1]:1"), ("a.b", "a.b:1")])
def test_an_address_is_written_as_grpc_reads_it(host: str, text: str) -> None:
    assert address(host, 1) == text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("drain_delay_seconds", -1.0),
        ("drain_timeout_seconds", float("nan")),
        ("stall_seconds", 0.0),
        ("stall_seconds", float("inf")),
        ("max_connection_age_seconds", 0.5),
        ("max_receive_bytes", 10),
        ("max_receive_bytes", 2**31),
        ("max_new_tokens_limit", 2**31),
        ("default_max_new_tokens", 2000),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: float) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=f"{field} = "):
        replace(CONFIG, **{field: value}).validate()
