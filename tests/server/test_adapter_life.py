"""The life of adapters through the admin API of a real server: generations, aliases, pins, watches, unloads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2

from runtime import cli
from runtime.pb.fmaas import generation_pb2 as fmaas
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.server.live import REPOSITORY, LiveServer, eventually, refused

ROOT = REPOSITORY / "runtime" / "demo" / "adapters"
ISO, US = "date-iso", "chinese-numerals"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer.demo(ROOT, "--max-adapters", "3") as live:
        yield live


@pytest.fixture(autouse=True)
def empty(server: LiveServer) -> Iterator[None]:
    """Each test begins and ends without adapters and aliases."""
    yield
    for alias in server.adapters.ListAliases(pb.ListAliasesRequest()).aliases:
        server.adapters.DeleteAlias(pb.DeleteAliasRequest(alias=alias.alias))
    for adapter in server.adapters.ListAdapters(pb.ListAdaptersRequest()).adapters:
        request = pb.UnloadAdapterRequest(name=adapter.name, allow_missing=True, force=True)
        server.adapters.UnloadAdapter(request)
    left = server.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert (list(left.adapters), left.bytes_used, left.bytes_host_used, left.slots_used) == ([], 0, 0, 0)


def _load(server: LiveServer, name: str, path: str, **options: object) -> pb.Adapter:
    return server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id=name, source_path=path, **options)).adapter


def _answer(server: LiveServer, adapter: str) -> tuple[str, str]:
    """The text of one answer, and who gave it."""
    request = fmaas.BatchedGenerationRequest(
        adapter_id=adapter, requests=[fmaas.GenerationRequest(text="date: 3 May 2024 ->")]
    )
    response, call = server.generation.Generate.with_call(request, timeout=20)
    return response.responses[0].text, dict(call.trailing_metadata())["graft-adapter"]


def _long_stream(server: LiveServer, adapter: str) -> grpc.Call:
    """A request that does not end by itself for a while; its first token has come."""
    stopping = {"max_new_tokens": 1000, "min_new_tokens": 1000}
    call = server.stream("date: 3 May 2024 ->", adapter, stopping=stopping)
    next(call)
    return call


def test_the_trailer_names_the_generation_and_a_replacement_changes_both(server: LiveServer) -> None:
    first = _load(server, "x", ISO)
    text, by = _answer(server, "x")
    assert by == f"x@{first.generation}"
    second = _load(server, "x", US, replace=True, expected_generation=first.generation)
    other_text, by = _answer(server, "x")
    assert by == f"x@{second.generation}" and other_text != text
    assert refused(lambda: _answer(server, f"x@{first.generation}"))[1] == "ADAPTER_NOT_FOUND"
    assert _answer(server, f"x@{second.generation}") == (other_text, by)


def test_an_alias_moves_and_the_trailer_says_to_whom(server: LiveServer) -> None:
    _load(server, "iso", ISO)
    _load(server, "us", US)
    answers, counted = {}, {}
    before = {name: server.metric(f'graft_adapter_requests_total{{adapter="{name}"') for name in ("iso", "us")}
    others = server.metric('graft_adapter_requests_total{adapter="other"')
    for name in ("iso", "us"):
        server.adapters.SetAlias(pb.SetAliasRequest(alias="live", adapter_id=name))
        answers[name] = _answer(server, "live")
        assert answers[name] == _answer(server, name)
        counted[name] = server.metric(f'graft_adapter_requests_total{{adapter="{name}"') - before[name]
    assert counted == {"iso": 2, "us": 2}, "what comes by an alias counts under the adapter"
    assert server.metric('graft_adapter_requests_total{adapter="other"') == others
    assert answers["iso"][0] != answers["us"][0]
    shown = server.adapters.GetAdapter(pb.GetAdapterRequest(name="live")).adapter
    assert shown.name == "adapters/us" and list(shown.layers)
    assert [alias.adapter_id for alias in server.adapters.ListAliases(pb.ListAliasesRequest()).aliases] == ["us"]
    call = pb.LoadAdapterRequest(adapter_id="live", source_path=ISO)
    assert refused(lambda: server.adapters.LoadAdapter(call))[1] == "ALIAS_EXISTS"


def test_a_stream_that_runs_keeps_its_generation_and_a_timed_unload_says_that_it_runs(server: LiveServer) -> None:
    first = _load(server, "x", ISO)
    stream = _long_stream(server, "x")
    _load(server, "x", US, replace=True)
    listed = server.adapters.ListAdapters(pb.ListAdaptersRequest(state=pb.Adapter.STATE_DRAINING)).adapters
    assert [adapter.generation for adapter in listed] == [first.generation]
    unload = pb.UnloadAdapterRequest(name="x", drain_timeout=duration_pb2.Duration(nanos=10_000_000))
    code, reason, _ = refused(lambda: server.adapters.UnloadAdapter(unload))
    assert (code, reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "ADAPTER_DRAINING")
    forced = server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="x", force=True))
    assert forced.bytes_device_freed > 0
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert dict(stream.trailing_metadata())["graft-adapter"] == f"x@{first.generation}"


def test_a_watcher_sees_all_that_is_there_and_then_every_change(server: LiveServer) -> None:
    _load(server, "there", ISO)
    seen: list[tuple[str, str]] = []
    call = server.adapters.WatchAdapters(pb.WatchAdaptersRequest())

    def read() -> None:
        try:
            for response in call:
                state = pb.Adapter.State.Name(response.adapter.state).removeprefix("STATE_")
                name = response.adapter.name.removeprefix("adapters/")
                seen.append(("--", "") if response.snapshot_complete else (name, state))
        except grpc.RpcError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert eventually(lambda: ("--", "") in seen)
    assert seen == [("there", "READY"), ("--", "")]
    _load(server, "x", US)
    server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="x"))
    assert eventually(lambda: ("x", "UNLOADED") in seen)
    call.cancel()
    reader.join(5)
    states = [state for place, (_, state) in enumerate(seen[2:]) if state != seen[place + 1][1]]
    assert states == ["LOADING", "READY", "DRAINING", "UNLOADED"]


def test_checking_pinning_and_registering(server: LiveServer) -> None:
    checked = _load(server, "x", ISO, validate_only=True)
    assert (checked.generation, checked.state) == (0, pb.Adapter.STATE_UNSPECIFIED) and checked.bytes_tensors > 0
    lazy = _load(server, "x", ISO, lazy=True)
    assert (lazy.state, lazy.placement) == (pb.Adapter.STATE_REGISTERED, pb.Adapter.PLACEMENT_DISK)
    _, by = _answer(server, "x")
    assert by == f"x@{lazy.generation}"
    assert server.adapters.PinAdapter(pb.PinAdapterRequest(name="x")).adapter.pinned
    now = server.adapters.GetAdapter(pb.GetAdapterRequest(name=f"x@{lazy.generation}")).adapter
    assert now.placement == pb.Adapter.PLACEMENT_DEVICE and now.pinned
    assert not server.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="x")).adapter.pinned


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.LoadAdapterRequest(adapter_id="x", source_path=ISO, expected_generation=-1), "expected_generation"),
        (pb.LoadAdapterRequest(adapter_id="x", source_path=ISO, request_id="r" * 129), "request_id"),
        (pb.LoadAdapterRequest(adapter_id="x", source_path=ISO, lazy=True, pinned=True), "pinned"),
        (pb.UnloadAdapterRequest(name="x", drain_timeout=duration_pb2.Duration(seconds=-1)), "drain_timeout"),
        (pb.ListAdaptersRequest(page_token="x"), "page_token"),
    ],
    ids=["generation", "request_id", "lazy", "timeout", "token"],
)
def test_what_cannot_be_meant_is_refused_by_name(server: LiveServer, request_: object, field: str) -> None:
    method = getattr(server.adapters, type(request_).__name__.removesuffix("Request"))
    assert refused(lambda: method(request_)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", field)


def test_more_adapters_than_slots_all_answer_as_when_they_are_alone(server: LiveServer) -> None:
    names = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
    assert len(names) > 3
    alone = {}
    for name in names:
        _load(server, name, name)
        alone[name] = _answer(server, name)[0]
        server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=name))
    for name in names:
        _load(server, name, name)
    for _ in range(2):
        assert {name: _answer(server, name)[0] for name in names} == alone
    page = server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2, name_prefix="date-"))
    assert page.slots_used == 3 and [item.name for item in page.adapters] == ["adapters/date-iso"]


def test_the_commands_do_what_they_say(server: LiveServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def graft(*words: str) -> str:
        status = cli.main(["adapters", *words, "--admin", server.admin_address])
        said = capsys.readouterr()
        return said.out if status == 0 else f"{status}: {said.err}"

    assert "can be loaded" in graft("load", "x", ISO, "--validate-only")
    assert "loaded: generation" in graft("load", "x", ISO, "--pin")
    assert "ADAPTER_EXISTS" in (refusal := graft("load", "x", US)) or "replace" in refusal
    assert "loaded: generation" in graft("load", "x", US, "--replace")
    assert graft("alias", "live", "x") == graft("alias") == "live -> x\n"
    assert graft("alias", "live", "--delete") == "live: deleted\n"
    listed = json.loads(graft("list", "--json"))
    assert (listed["name"], listed["pinned"], listed["state"]) == ("adapters/x", True, "STATE_READY")
    assert "DEVICE pinned" in graft("list", "--state", "ready", "--prefix", "x")
    assert graft("unpin", "x") == "x: not pinned\n" and graft("pin", "x") == "x: pinned\n"
    assert "bytes of the device" in graft("unload", "x", "--drain-timeout", "5")
    assert "nothing was loaded" in graft("unload", "x", "--allow-missing")
    assert graft("alias", "live").startswith("1: ")
