"""`graft server ...` against a live server, and the flags of `graft serve` that concern operating it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from runtime.cli import build_parser, main
from runtime.commands.serve import build_config
from runtime.pb.fmaas import generation_pb2 as pb
from tests.server.live import LiveServer, refused

LONG = pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=200, min_new_tokens=200))  # two seconds
ABORTED = (grpc.StatusCode.ABORTED, "ABORTED_BY_OPERATOR", "")


@pytest.fixture(scope="module")
def live(adapters_root: Path) -> Iterator[LiveServer]:
    with LiveServer.fake(adapters_root, step_seconds=0.01) as server:
        yield server


@pytest.fixture
def doomed(adapters_root: Path) -> Iterator[LiveServer]:
    with LiveServer.fake(adapters_root, step_seconds=0.01) as server:
        yield server


def run(capsys: pytest.CaptureFixture[str], live: LiveServer, *arguments: str) -> tuple[int, list[str], str]:
    """Status, lines of stdout, and stderr."""
    status = main(["server", *arguments, "--admin", live.admin_address])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def start(live: LiveServer, correlation_id: str) -> grpc.Call:
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="abc"), params=LONG)
    call = live.generation.GenerateStream(request, timeout=20, metadata=(("x-correlation-id", correlation_id),))
    next(call)
    return call


def test_info_shows_the_state_the_model_and_every_limit(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = run(capsys, live, "info")
    shown = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert status == 0
    assert (shown["state"], shown["model"], shown["kind"], shown["dtype"]) == (
        "READY",
        "model",
        "deepseek_v3",
        "float32",
    )
    assert (shown["max_model_len"], shown["max_new_tokens"], shown["min_temperature"]) == ("256", "1024", "0.05")
    bounds = (shown["max_adapter_requests"], shown["max_adapter_tokens"], shown["replacement_experts"])
    assert bounds == ("512", "no bound", "0")


def test_load_lists_the_running_requests_and_abort_ends_them(
    live: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {name: start(live, name) for name in ("one", "two", "three")}
    status, lines, _ = run(capsys, live, "load")
    header, *rows = lines[:4]
    assert status == 0 and header.split()[:3] == ["REQUEST", "CORRELATION", "ADAPTER"]
    assert [row.split()[1] for row in rows] == ["one", "two", "three"]
    assert lines[4].startswith("3 sequences running (0 of them paused), 0 waiting")
    assert run(capsys, live, "abort", "--request", rows[0].split()[0]) == (0, ["1 request ended"], "")
    assert run(capsys, live, "abort", "--correlation", "two") == (0, ["1 request ended"], "")
    assert run(capsys, live, "abort", "--adapter", "nobody") == (0, ["0 requests ended"], "")
    assert run(capsys, live, "abort", "--all") == (0, ["1 request ended"], "")
    for call in calls.values():
        assert refused(lambda call=call: list(call)) == ABORTED


def test_drain_shows_how_many_still_run_until_none_does(doomed: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    call = start(doomed, "last")
    status, out, err = run(capsys, doomed, "drain", "--timeout", "0.2")
    assert (status, out[0]) == (1, "STARTED: 1 request running")
    assert "still running after 0.2 s: 1 of the calls" in err
    status, lines, _ = run(capsys, doomed, "drain")
    assert status == 0
    assert (lines[0], lines[-1]) == ("IN_PROGRESS: 1 request running", "COMPLETE: 0 requests running")
    assert list(call)[-1].generated_token_count == 200
    assert run(capsys, doomed, "load")[1][-1] == "the server is draining"
    assert run(capsys, doomed, "info")[1][1].split() == ["state", "DRAINING"]


@pytest.mark.parametrize("arguments", [[], ["abort"], ["abort", "--all", "--adapter", "a"], ["drain", "--timeout"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["server", *arguments])
    assert caught.value.code == 2


def test_every_flag_of_serve_reaches_its_setting() -> None:
    flags = {
        "--drain-delay": "1.5",
        "--drain-timeout": "2.5",
        "--stall-seconds": "3.5",
        "--max-connection-age": "4.5",
        "--max-waiting-requests": "5",
        "--max-adapter-requests": "3",
        "--max-adapter-tokens": "9000",
        "--max-new-tokens": "600",
        "--default-max-new-tokens": "7",
    }
    arguments = [word for pair in flags.items() for word in pair]
    config = build_config(build_parser().parse_args(["serve", *arguments]))
    seen = (
        config.drain_delay_seconds,
        config.drain_timeout_seconds,
        config.stall_seconds,
        config.max_connection_age_seconds,
        config.engine.max_waiting_requests,
        config.max_adapter_requests,
        config.max_adapter_tokens,
        config.max_new_tokens_limit,
        config.default_max_new_tokens,
    )
    assert seen == tuple(map(float, flags.values()))


def test_serve_without_flags_has_the_stated_defaults() -> None:
    config = build_config(build_parser().parse_args(["serve"]))
    assert (config.drain_delay_seconds, config.drain_timeout_seconds) == (5.0, 60.0)
    assert (config.stall_seconds, config.max_connection_age_seconds) == (120.0, 1800.0)
    assert (config.max_new_tokens_limit, config.default_max_new_tokens) == (1024, 20)
    assert (config.max_adapter_requests, config.max_adapter_tokens) == (512, 0)
