"""The HTTP port: metrics, probes, and the model list that routers read."""

from __future__ import annotations

import json
import socket

from tests.server.live import LiveServer


def test_metrics_count_requests_tokens_and_latencies(server: LiveServer) -> None:
    names = (
        "graft_request_success_total",
        "graft_prompt_tokens_total",
        "graft_generation_tokens_total",
        "graft_time_to_first_token_seconds_count",
        "graft_inter_token_latency_seconds_count",
        "graft_e2e_request_latency_seconds_count",
        "graft_request_queue_time_seconds_count",
    )
    before = {name: server.metric(name) for name in names}
    response = server.generate("one two three", stopping={"max_new_tokens": 50})
    gained = [server.metric(name) - before[name] for name in names]
    tokens = response.generated_token_count
    assert gained == [1, response.input_token_count, tokens, 1, tokens - 1, 1, 1]


def test_metrics_tell_what_the_engine_holds(server: LiveServer) -> None:
    assert server.metric("graft_adapters_resident") == 1
    assert server.metric("graft_adapter_bytes") == 1000
    assert server.metric("graft_adapter_vacant_bytes") == 250
    assert server.metric("graft_adapter_fragmentation_ratio") == 0.2
    for gauge in ("graft_requests_running", "graft_requests_waiting", "graft_kv_cache_usage_ratio", "graft_draining"):
        assert server.metric(gauge) == 0
    assert 'model_name="model"' in server.get("/metrics")[1]


def test_the_model_list_names_the_base_as_parent_of_each_adapter(server: LiveServer) -> None:
    status, body = server.get("/v1/models")
    base, adapter = json.loads(body)["data"]
    assert status == 200
    assert (base["id"], base["parent"], base["max_model_len"]) == ("model", None, 256)
    assert (adapter["id"], adapter["parent"]) == ("dates", "model")


def test_probes_say_ok_and_other_paths_do_not_exist(server: LiveServer) -> None:
    assert server.get("/healthz") == (200, "ok\n")
    assert server.get("/readyz") == (200, "ok\n")
    assert server.get("/../../etc/passwd")[0] == 404


def raw(server: LiveServer, request: bytes) -> bytes:
    """What comes back for these bytes."""
    host, port = server.http_address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(100)


def test_what_is_not_http_is_a_bad_request_and_harms_nothing(server: LiveServer) -> None:
    assert raw(server, b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw(server, b"POST /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405")
    assert raw(server, b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.get("/healthz")[0] == 200
