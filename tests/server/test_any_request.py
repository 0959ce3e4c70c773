"""Whatever a client writes into the fields of a request: an answer or a documented code, in time, and a next answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.demo import ADAPTERS_DIR
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from runtime.pb.graft.admin.v1 import server_pb2 as server_pb
from tests.server.live import LiveServer

ADAPTER = "date-iso"
SECONDS = 30.0  # far more than any answer here takes: reaching it is a hang
GENERATION_CODES = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
ADMIN_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
}
QUICK = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\0", "é🙂", "\ufffd", "<｜end▁of▁sentence｜>", "../x"]),
    st.sampled_from(["(a|b){1,9}", '{"type": "integer"}', 'start: "a" | "b"']),
)
WHOLE = st.one_of(st.integers(0, 12), st.sampled_from([63, 64, 1024, 1025, 2**31 - 1]))
REAL = st.one_of(
    st.floats(width=32), st.floats(0, 2, width=32), st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1.0])
)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: TEXTS,
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_FLOAT: REAL,
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 9),
    FieldDescriptor.CPPTYPE_UINT32: st.one_of(WHOLE, st.just(2**32 - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.one_of(WHOLE, st.just(2**64 - 1)),
    FieldDescriptor.CPPTYPE_INT32: st.one_of(WHOLE, st.integers(-5, -1)),
    FieldDescriptor.CPPTYPE_INT64: st.one_of(WHOLE, st.integers(-5, -1)),
}
NAMES = st.one_of(st.sampled_from(["", ADAPTER, "nobody"]), TEXTS)


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Any message of this type: each field absent, or any value of its type, extremes more often."""
    values = {field.name: _values(field) for field in descriptor.fields}
    message_class = GetMessageClass(descriptor)

    def build(fields: dict[str, Any]) -> Message:
        message = message_class()
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(message, name).extend(value)
            elif isinstance(value, Message):
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    return st.fixed_dictionaries({}, optional=values).map(build)


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.name in ("adapter_id", "name"):
        one: st.SearchStrategy[Any] = NAMES
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        one = messages(field.message_type)
    else:
        one = SCALARS[field.cpp_type]
    return st.lists(one, max_size=4) if field.is_repeated else one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root: Path = tmp_path_factory.mktemp("root")
    shutil.copytree(ADAPTERS_DIR / ADAPTER, root / ADAPTER)
    with LiveServer.demo(root, "--max-model-len", "96") as live:
        live.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id=ADAPTER, source_path=ADAPTER), timeout=60)
        yield live


def _code(call: Any) -> grpc.StatusCode:
    """OK, or the code of a rich status of ours."""
    try:
        call()
    except grpc.RpcError as error:
        assert rpc_status.from_call(error) is not None, error
        return error.code()
    return grpc.StatusCode.OK


def _serves(server: LiveServer) -> bool:
    return server.generate("x", stopping={"max_new_tokens": 1}).generated_token_count == 1


@settings(QUICK, max_examples=120)
@given(request=messages(pb.SingleGenerationRequest.DESCRIPTOR))
def test_any_stream_request(server: LiveServer, request: pb.SingleGenerationRequest) -> None:
    code = _code(lambda: list(server.generation.GenerateStream(request, timeout=SECONDS)))
    assert code in {grpc.StatusCode.OK, *GENERATION_CODES}
    assert _serves(server)


@settings(QUICK, max_examples=60)
@given(request=messages(pb.BatchedGenerationRequest.DESCRIPTOR))
def test_any_batch_request(server: LiveServer, request: pb.BatchedGenerationRequest) -> None:
    code = _code(lambda: server.generation.Generate(request, timeout=SECONDS))
    assert code in {grpc.StatusCode.OK, *GENERATION_CODES}
    assert _serves(server)


@settings(QUICK, max_examples=80)
@given(params=messages(pb.Parameters.DESCRIPTOR))
def test_any_parameters_with_a_good_prompt(server: LiveServer, params: pb.Parameters) -> None:
    """More of these get as far as the engine."""
    params.stopping.max_new_tokens %= 64
    params.stopping.min_new_tokens = min(params.stopping.min_new_tokens, params.stopping.max_new_tokens)
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="Input:\nx\n"), params=params)
    code = _code(lambda: list(server.generation.GenerateStream(request, timeout=SECONDS)))
    assert code in {grpc.StatusCode.OK, *GENERATION_CODES}
    assert _serves(server)


@settings(QUICK, max_examples=60)
@given(request=messages(pb.BatchedTokenizeRequest.DESCRIPTOR))
def test_any_tokenize_request(server: LiveServer, request: pb.BatchedTokenizeRequest) -> None:
    code = _code(lambda: server.generation.Tokenize(request, timeout=SECONDS))
    assert code in {grpc.StatusCode.OK, *GENERATION_CODES}
    assert _serves(server)


@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_any_admin_request(server: LiveServer, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(list(admin_pb.DESCRIPTOR.services_by_name["AdapterService"].methods)))
    request = data.draw(messages(method.input_type))
    if method.name == "UnloadAdapter" and request.name.removeprefix("adapters/") == ADAPTER:
        request.name = "nobody"
    code = _code(lambda: getattr(server.adapters, method.name)(request, timeout=SECONDS))
    assert code in {grpc.StatusCode.OK, *ADMIN_CODES}
    assert server.generate("x", ADAPTER, stopping={"max_new_tokens": 1}).generated_token_count == 1


@settings(QUICK, max_examples=40)
@given(data=st.data())
def test_any_request_about_the_server(server: LiveServer, data: st.DataObject) -> None:
    """All but Drain, after which no request would be answered; an empty Abort or one for nobody ends nothing."""
    methods = {method.name: method for method in server_pb.DESCRIPTOR.services_by_name["ServerService"].methods}
    method = data.draw(st.sampled_from([methods[name] for name in sorted(methods.keys() - {"Drain"})]))
    request = data.draw(messages(method.input_type))
    code = _code(lambda: getattr(server.admin, method.name)(request, timeout=SECONDS))
    assert code in {grpc.StatusCode.OK, *ADMIN_CODES}
    assert _serves(server)
