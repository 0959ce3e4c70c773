"""Weighted sums of adapters through both ports of a real server, and the command that names one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest

from runtime import cli
from runtime.pb.fmaas import generation_pb2 as fmaas
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1 import server_pb2 as server_pb
from tests.server.live import REPOSITORY, LiveServer, refused

ROOT = REPOSITORY / "runtime" / "demo" / "adapters"
PROMPT = "date: 3 May 2024 ->"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer.demo(ROOT) as live:
        for name, path in (("iso", "date-iso"), ("numerals", "chinese-numerals")):
            live.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id=name, source_path=path))
        yield live


def _answer(server: LiveServer, adapter: str) -> tuple[str, str]:
    """The text of one answer, and who gave it."""
    request = fmaas.BatchedGenerationRequest(adapter_id=adapter, requests=[fmaas.GenerationRequest(text=PROMPT)])
    response, call = server.generation.Generate.with_call(request, timeout=20)
    return response.responses[0].text, dict(call.trailing_metadata())["graft-adapter"]


def _listed(server: LiveServer) -> dict[str, pb.Adapter]:
    adapters = server.adapters.ListAdapters(pb.ListAdaptersRequest()).adapters
    return {adapter.name.removeprefix("adapters/"): adapter for adapter in adapters}


def test_the_trailer_names_all_parts_with_their_generations(server: LiveServer) -> None:
    alone = _answer(server, "iso")[0]
    text, by = _answer(server, "0.001*numerals+iso")
    assert by == "iso@1+0.001*numerals@2" and text == alone
    assert _answer(server, "iso@1+0.001*numerals") == (text, by)
    assert _answer(server, "0.5*iso+0.5*iso") == (alone, "iso@1")
    shown = server.adapters.GetAdapter(pb.GetAdapterRequest(name="0.001*numerals+iso")).adapter
    assert shown == _listed(server)[by] and shown.derived
    assert [(part.adapter_id, part.generation, part.weight) for part in shown.parts] == [
        ("iso", 1, 1.0), ("numerals", 2, 0.001)
    ]  # fmt: skip
    page = server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2))
    rest = server.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=page.next_page_token))
    assert len(page.adapters) == 2 and {item.name for item in rest.adapters}.isdisjoint(
        item.name for item in page.adapters
    )


def test_a_stream_of_a_sum_can_be_ended_by_the_name_of_a_part(server: LiveServer) -> None:
    stopping = {"max_new_tokens": 1000, "min_new_tokens": 1000}
    stream = server.stream(PROMPT, "0.4*iso+0.6*numerals", stopping=stopping)
    next(stream)
    assert server.admin.Abort(server_pb.AbortRequest(adapter_id="numerals")).aborted_count == 1
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert dict(stream.trailing_metadata())["graft-adapter"] == "0.4*iso@1+0.6*numerals@2"


@pytest.mark.parametrize(
    ("adapter", "reason", "said"),
    [
        ("iso+nobody", "ADAPTER_NOT_FOUND", "'nobody' is not loaded"),
        ("iso+iso@9", "ADAPTER_NOT_FOUND", "no live generation 9"),
        ("nan*iso+numerals", "ADAPTER_ID_INVALID", "part 1: 'nan' is not a weight"),
        ("iso+-1*iso", "ADAPTER_ID_INVALID", "add up to 0"),
        ("+".join(["iso"] * 9), "ADAPTER_ID_INVALID", "at most 8"),
    ],
)
def test_a_sum_that_cannot_be_is_refused_by_field_and_part(
    server: LiveServer, adapter: str, reason: str, said: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        _answer(server, adapter)
    assert said in caught.value.details()
    assert refused(lambda: _answer(server, adapter)) == (grpc.StatusCode.INVALID_ARGUMENT, reason, "adapter_id")


def test_tokenize_looks_every_part_up(server: LiveServer) -> None:
    def tokenize(adapter: str) -> int:
        request = fmaas.BatchedTokenizeRequest(adapter_id=adapter, requests=[fmaas.TokenizeRequest(text=PROMPT)])
        return server.generation.Tokenize(request).responses[0].token_count

    assert tokenize("0.123*iso+numerals") == tokenize("")
    assert refused(lambda: tokenize("iso+nobody"))[1] == "ADAPTER_NOT_FOUND"
    assert "0.123*iso@1+numerals@2" not in _listed(server)


def test_sums_count_among_the_others_in_the_metrics_and_named_ones_under_their_name(server: LiveServer) -> None:
    others = server.metric('graft_adapter_requests_total{adapter="other"')
    iso = server.metric('graft_adapter_requests_total{adapter="iso"')
    _answer(server, "iso@1+0.25*numerals")
    body = server.get("/metrics")[1]
    assert "0.25" not in "".join(line for line in body.splitlines() if "adapter=" in line)
    lines = [line for line in body.splitlines() if line.startswith("graft_adapter_requests_total")]
    assert lines, "the series is there"
    assert server.metric('graft_adapter_requests_total{adapter="other"') == others + 1
    assert server.metric('graft_adapter_requests_total{adapter="iso"') == iso


def test_composing_by_command(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    def graft(*words: str) -> str:
        status = cli.main(["adapters", *words, "--admin", server.admin_address])
        said = capsys.readouterr()
        return said.out if status == 0 else f"{status}: {said.err}"

    parts = ("--from", "iso=0.7", "--from", "numerals=-0.3")
    assert "can be made of 0.7*iso@1 + -0.3*numerals@2: rank" in graft("compose", "mix", *parts, "--validate-only")
    assert "mix made of 0.7*iso@1 + -0.3*numerals@2: rank" in graft("compose", "mix", *parts)
    assert "was already made of" in graft("compose", "mix", *parts)
    told = graft("compose", "mix", "--from", "iso", "--from", "numerals=0.2")
    assert told.startswith("1: ") and "with replace" in told
    generation = server.adapters.GetAdapter(pb.GetAdapterRequest(name="mix")).adapter.generation
    assert _answer(server, "mix") == (_answer(server, "0.7*iso+-0.3*numerals")[0], f"mix@{generation}")
    assert "sum of                0.7*iso@1 + -0.3*numerals@2" in graft("show", "mix")
    assert "0.7*iso@1 + -0.3*numerals@2" in graft("list", "--prefix", "mix")
    assert json.loads(graft("list", "--prefix", "mix", "--json"))["parts"][1]["weight"] == -0.3
    assert "'nobody' is not loaded" in graft("compose", "x", "--from", "iso", "--from", "nobody")
    assert "expression 'half*iso': 'half' is not a weight" in graft("compose", "x", "--from", "iso=half")
    assert "bytes of the device" in graft("unload", "mix")


def test_composing_names_the_field_at_fault(server: LiveServer) -> None:
    def compose(**fields: object) -> tuple[grpc.StatusCode, str, str]:
        return refused(lambda: server.adapters.ComposeAdapter(pb.ComposeAdapterRequest(**fields)))

    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert compose(adapter_id="a+b", expression="iso") == (invalid, "ADAPTER_ID_INVALID", "adapter_id")
    assert compose(adapter_id="x", expression="") == (invalid, "ADAPTER_ID_INVALID", "expression")
    assert compose(adapter_id="x", expression="iso+-1*iso") == (invalid, "ADAPTER_ID_INVALID", "expression")
    assert compose(adapter_id="x", expression="iso", expected_generation=-1)[2] == "expected_generation"
    assert compose(adapter_id="x", expression="iso", request_id="r" * 129)[2] == "request_id"
    code, reason, _ = compose(adapter_id="x", expression="iso+nobody")
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
