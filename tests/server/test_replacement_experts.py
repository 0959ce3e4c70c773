"""ESFT adapters through a real server: loaded or named on demand, shown as what they are, refused in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from runtime import cli
from runtime.commands.generate import generate_local
from runtime.pb.fmaas import generation_pb2 as fmaas
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.oracle.replacement_experts import moe_layers, write_replacement
from tests.server.live import DEMO_MODEL, LiveServer, refused

ROOM = 3
PROMPT = "date: 3 May 2024 ->"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, of which the second one needs more room than the server has."""
    folder = tmp_path_factory.mktemp("adapters")
    layers = moe_layers(DEMO_MODEL)
    chosen = {layer: [layer, 8, 21] for layer in layers}
    write_replacement(DEMO_MODEL, folder / "three", chosen, gain=8.0, dtype=torch.bfloat16)
    write_replacement(DEMO_MODEL, folder / "four", {layers[0]: [0, 1, 2, 3]})
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    with LiveServer.demo(root, "--replacement-experts", str(ROOM), "--adapters-on-demand") as live:
        yield live


def _text(server: LiveServer, adapter: str | None) -> str:
    return server.generate(PROMPT, adapter, stopping={"max_new_tokens": 12}).text


def test_a_request_may_name_its_folder_and_gets_what_the_experts_say(server: LiveServer, root: Path) -> None:
    text = _text(server, "three")
    assert text != _text(server, None)
    local = "".join(generate_local(DEMO_MODEL, str(root / "three"), PROMPT))
    assert text and local.startswith(text)
    request = fmaas.BatchedGenerationRequest(adapter_id="three", requests=[fmaas.GenerationRequest(text=PROMPT)])
    _, call = server.generation.Generate.with_call(request, timeout=20)
    assert dict(call.trailing_metadata())["graft-adapter"].startswith("three@")


def test_it_is_shown_as_what_it_is_with_its_own_bytes(
    server: LiveServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _text(server, "three")
    shown = server.adapters.GetAdapter(pb.GetAdapterRequest(name="three")).adapter
    layers = moe_layers(DEMO_MODEL)
    assert [(item.layer, item.experts) for item in shown.layers] == [(layer, 3) for layer in layers]
    assert (list(shown.target_modules), shown.rank, shown.expert_count) == (["replaced_experts"], 0, 3 * len(layers))
    assert shown.bytes_device == shown.bytes_host > 0
    listed = server.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert listed.bytes_used == shown.bytes_device == shown.bytes_tensors
    assert server.metric('graft_adapter_bytes{model_name="model",tier="device"') == shown.bytes_device
    # As much as this adapter takes is set aside: it fills the room.
    assert listed.bytes_limit == 2**30 + shown.bytes_device
    assert listed.bytes_host_limit == 2 * listed.bytes_limit
    told = f"room for {ROOM} replacement experts in each of {len(layers)} layers takes {shown.bytes_device} bytes"
    assert told in "".join(server.errors)
    assert cli.main(["adapters", "show", "three", "--admin", server.admin_address]) == 0
    out = capsys.readouterr().out
    assert f"replaced experts {3 * len(layers)}" in " ".join(out.split()) and "replaced_experts" in out


def test_one_that_needs_more_room_is_refused_with_the_setting(server: LiveServer) -> None:
    request = pb.LoadAdapterRequest(adapter_id="four", source_path="four", validate_only=True)
    code, reason, _ = refused(lambda: server.adapters.LoadAdapter(request))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_REFUSED")
    with pytest.raises(grpc.RpcError, match="start it with --replacement-experts 4 or more"):
        server.adapters.LoadAdapter(request)


def test_a_sum_with_it_is_refused_by_its_name(server: LiveServer) -> None:
    code, reason, field = refused(lambda: _text(server, "0.5*three"))
    assert (code, reason, field) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_REFUSED", "adapter_id")
    compose = pb.ComposeAdapterRequest(adapter_id="mix", expression="2*three")
    assert refused(lambda: server.adapters.ComposeAdapter(compose))[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_a_replacement_and_an_unload_give_the_bytes_back(server: LiveServer) -> None:
    first = server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="x", source_path="three")).adapter
    _text(server, "x")
    gone = server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="x"))
    assert gone.bytes_device_freed == gone.bytes_host_freed == first.bytes_tensors
    assert refused(lambda: _text(server, "x"))[1] == "ADAPTER_NOT_FOUND"
