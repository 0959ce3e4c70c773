"""A table of bad inputs, each with its code, field and message, on a live server that answers the next request."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runtime.demo import ADAPTERS_DIR
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from tests.conftest import RecordNumber
from tests.server.bad_adapters import BROKEN, write_broken
from tests.server.live import LiveServer

GOOD = "date-iso"
PROMPT, ANSWER = "Input:\nMarch 4th, 1999\nOutput:\n", "1999-03-04"
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
REFUSED = grpc.StatusCode.FAILED_PRECONDITION
NAN, INFINITY = float("nan"), float("inf")

# Part of Parameters -> values, the field's path below params, a piece of the message.
BAD_PARAMETERS: list[tuple[str, dict[str, Any], str, str]] = [
    ("sampling", {"temperature": -1.0}, "sampling.temperature", "temperature = -1.0"),
    ("sampling", {"temperature": 0.01}, "sampling.temperature", "0.05"),
    ("sampling", {"temperature": 101.0}, "sampling.temperature", "100"),
    ("sampling", {"temperature": NAN}, "sampling.temperature", "nan"),
    ("sampling", {"temperature": INFINITY}, "sampling.temperature", "inf"),
    ("sampling", {"top_p": -0.5}, "sampling.top_p", "0 (off)..1"),
    ("sampling", {"top_p": 1.5}, "sampling.top_p", "1.5"),
    ("sampling", {"top_p": NAN}, "sampling.top_p", "nan"),
    ("sampling", {"typical_p": -0.5}, "sampling.typical_p", "-0.5"),
    ("sampling", {"typical_p": 1.5}, "sampling.typical_p", "1.5"),
    ("sampling", {"typical_p": NAN}, "sampling.typical_p", "nan"),
    ("stopping", {"max_new_tokens": 1025}, "stopping.max_new_tokens", "1024"),
    ("stopping", {"max_new_tokens": 2**32 - 1}, "stopping.max_new_tokens", "4294967295"),
    ("stopping", {"min_new_tokens": 21}, "stopping.min_new_tokens", "max_new_tokens (20)"),
    ("stopping", {"max_new_tokens": 5, "min_new_tokens": 6}, "stopping.min_new_tokens", "max_new_tokens (5)"),
    ("stopping", {"stop_sequences": list("abcdefg")}, "stopping.stop_sequences", "at most 6"),
    ("stopping", {"stop_sequences": ["x", ""]}, "stopping.stop_sequences[1]", "1..240 bytes"),
    ("stopping", {"stop_sequences": ["é" * 121]}, "stopping.stop_sequences[0]", "242"),
    ("decoding", {"repetition_penalty": -1.0}, "decoding.repetition_penalty", "-1.0"),
    ("decoding", {"repetition_penalty": 2.5}, "decoding.repetition_penalty", "2.0"),
    ("decoding", {"repetition_penalty": NAN}, "decoding.repetition_penalty", "nan"),
    ("decoding", {"length_penalty": {"start_index": 1}}, "decoding.length_penalty.decay_factor", "1.0..10.0"),
    ("decoding", {"length_penalty": {"decay_factor": 11.0}}, "decoding.length_penalty.decay_factor", "11.0"),
    ("decoding", {"length_penalty": {"decay_factor": NAN}}, "decoding.length_penalty.decay_factor", "nan"),
    ("decoding", {"format": 7}, "decoding.format", "JSON (1)"),
    ("decoding", {"json_schema": ""}, "decoding.json_schema", "0 bytes"),
    ("decoding", {"json_schema": "{"}, "decoding.json_schema", "not JSON"),
    ("decoding", {"json_schema": "[1]"}, "decoding.json_schema", "object"),
    ("decoding", {"json_schema": "[" * 10_000}, "decoding.json_schema", "not JSON"),
    ("decoding", {"json_schema": '{"type": "nothing"}'}, "decoding.json_schema", ""),
    ("decoding", {"json_schema": '{"description": "%s"}' % ("x" * 20_000)}, "decoding.json_schema", "16384"),
    ("decoding", {"regex": "(unclosed"}, "decoding.regex", ""),
    ("decoding", {"regex": "a" * 20_000}, "decoding.regex", "16384"),
    ("decoding", {"grammar": "start: nothing"}, "decoding.grammar", ""),
    ("decoding", {"choice": {}}, "decoding.choice.choices", "1..256"),
    ("decoding", {"choice": {"choices": ["a", ""]}}, "decoding.choice.choices[1]", "empty"),
    ("decoding", {"choice": {"choices": [str(n) for n in range(257)]}}, "decoding.choice.choices", "257"),
    ("response", {"generated_tokens": True, "top_n_tokens": 11}, "response.top_n_tokens", "0..10"),
    ("response", {"token_logprobs": True}, "response.generated_tokens", "input_tokens"),
    ("response", {"token_ranks": True}, "response.generated_tokens", "input_tokens"),
    ("response", {"top_n_tokens": 2}, "response.generated_tokens", "input_tokens"),
]
BAD_ADAPTER_IDS = ["nobody", "../date-iso", "/etc/passwd", "a/b", ".hidden", "x" * 64, "date-iso ", "é", "a\0b"]
BAD_PATHS: list[tuple[str, grpc.StatusCode, str]] = [
    ("", INVALID, "relative"),
    ("/etc", INVALID, "relative"),
    ("../outside", INVALID, "'..'"),
    ("date-iso/../../outside", INVALID, "'..'"),
    (".", INVALID, "below"),
    ("a\0b", INVALID, "relative"),
    ("nothing-here", MISSING, "nothing-here"),
    ("leads-out", INVALID, "symbolic link"),
    ("leads-out/secret", INVALID, "symbolic link"),
    ("linked", INVALID, "symbolic link"),
    ("date-iso/adapter_config.json", INVALID, "not a folder"),
]
NUM_CASES = len(BAD_PARAMETERS) + len(BAD_ADAPTER_IDS) + len(BAD_PATHS) + len(BROKEN) + 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, outside = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("outside")
    shutil.copytree(ADAPTERS_DIR / GOOD, folder / GOOD)
    shutil.copytree(ADAPTERS_DIR / GOOD, outside / "secret")
    (folder / "leads-out").symlink_to(outside)
    write_broken(ADAPTERS_DIR / GOOD, folder)
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    with LiveServer.demo(root, "--max-model-len", "512") as live:
        live.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id=GOOD, source_path=GOOD), timeout=60)
        yield live


@pytest.fixture(autouse=True)
def the_next_request_is_answered(server: LiveServer) -> Iterator[None]:
    yield
    assert server.generate(PROMPT, GOOD).text.strip() == ANSWER


def _failure(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, str]:
    """Code, field, and everything that is told; each error carries exactly one ErrorInfo of ours."""
    field, told, infos = "", [error.details()], []
    for detail in rpc_status.from_call(error).details:
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        precondition = error_details_pb2.PreconditionFailure()
        if detail.Unpack(info):
            infos.append(info)
        elif detail.Unpack(request):
            field = request.field_violations[0].field
        elif detail.Unpack(precondition):
            told += [violation.description for violation in precondition.violations]
    assert [info.domain for info in infos] == ["graft"] and infos[0].reason.isupper()
    return error.code(), field, " ".join(told)


def _refused(server: LiveServer, request: pb.SingleGenerationRequest) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(server.generation.GenerateStream(request, timeout=30))
    return _failure(caught.value)


@pytest.mark.parametrize(("part", "values", "field", "message"), BAD_PARAMETERS)
def test_a_bad_parameter(server: LiveServer, part: str, values: dict[str, Any], field: str, message: str) -> None:
    params = pb.Parameters(method=pb.SAMPLE, **{part: values})
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=PROMPT), params=params)
    code, named, told = _refused(server, request)
    assert (code, named) == (INVALID, f"params.{field}")
    assert message in told


def test_a_method_that_does_not_exist(server: LiveServer) -> None:
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=PROMPT), params=pb.Parameters(method=9))
    code, field, told = _refused(server, request)
    assert (code, field) == (INVALID, "params.method") and "SAMPLE (1)" in told


@pytest.mark.parametrize("adapter", BAD_ADAPTER_IDS)
def test_a_bad_adapter_id(server: LiveServer, adapter: str) -> None:
    request = pb.SingleGenerationRequest(adapter_id=adapter, request=pb.GenerationRequest(text=PROMPT))
    code, field, told = _refused(server, request)
    assert (code, field) == (INVALID, "adapter_id")
    assert "adapter" in told


def test_a_prefix_id(server: LiveServer) -> None:
    request = pb.SingleGenerationRequest(prefix_id="p", request=pb.GenerationRequest(text=PROMPT))
    code, field, told = _refused(server, request)
    assert (code, field) == (INVALID, "prefix_id") and "adapter_id" in told


@pytest.mark.parametrize("text", ["word " * 600, "word " * 100_000, "\U0001f642" * 2_000])
def test_a_prompt_that_is_too_long(server: LiveServer, text: str) -> None:
    code, field, told = _refused(server, pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text)))
    assert (code, field) == (INVALID, "request.text") and "512" in told


@pytest.mark.parametrize(("path", "code", "message"), BAD_PATHS)
def test_a_bad_source_path(server: LiveServer, path: str, code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id="bad", source_path=path), timeout=60)
    seen, field, told = _failure(caught.value)
    assert (seen, field) == (code, "source_path")
    assert message in told


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_folder(server: LiveServer, root: Path, name: str) -> None:
    before = server.adapters.ListAdapters(admin_pb.ListAdaptersRequest())
    with pytest.raises(grpc.RpcError) as caught:
        server.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id="bad", source_path=name), timeout=60)
    code, _, told = _failure(caught.value)
    assert code is REFUSED
    assert BROKEN[name][1] in told
    assert str(root) not in told
    after = server.adapters.ListAdapters(admin_pb.ListAdaptersRequest())
    assert (after.slots_used, after.bytes_used) == (before.slots_used, before.bytes_used)


def test_the_table_is_long_enough(record_number: RecordNumber) -> None:
    record_number("bad inputs, each with its code and message", NUM_CASES, at_least=60)
