"""The wire contract: the published client, reflection, the frozen proto, the generated code."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from runtime.pb.fmaas import generation_pb2
from tests.server.live import REPOSITORY, LiveServer


@pytest.fixture(scope="module")
def caikit(server: LiveServer) -> dict:
    client = REPOSITORY / "tests" / "server" / "caikit_client.py"
    done = subprocess.run([sys.executable, str(client), server.address], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_published_client_generates_a_batch(caikit: dict) -> None:
    first, second = caikit["generate"]["responses"]
    assert (first["text"], first["stop_reason"], first["stop_sequence"]) == ("one STOP", "STOP_SEQUENCE", "STOP")
    assert (second["text"], second["stop_reason"], second["seed"]) == ("three", "EOS_TOKEN", "7")
    assert second["generated_token_count"] == len(second["tokens"]) == second["input_token_count"]
    token = second["tokens"][0]
    assert token["logprob"] == -0.5 and token["rank"] == 1
    assert [top["logprob"] for top in token["top_tokens"]] == [-0.5, -1.5]


def test_the_published_client_streams_from_an_adapter(caikit: dict) -> None:
    first, *deltas = caikit["stream"]
    assert first == {"input_token_count": 3}
    assert "".join(delta.get("text", "") for delta in deltas) == "abcabc"
    assert deltas[-1]["stop_reason"] == "EOS_TOKEN"
    assert all("stop_reason" not in delta for delta in deltas[:-1])


def test_the_published_client_tokenizes_and_reads_model_info(caikit: dict) -> None:
    (tokenized,) = caikit["tokenize"]["responses"]
    assert tokenized["token_count"] == len(tokenized["tokens"]) == len(tokenized["offsets"])
    assert tokenized["offsets"][1] == {"end": 1}
    assert caikit["info"] == {"max_sequence_length": 256, "max_new_tokens": 1024}


def test_the_frozen_proto_equals_the_published_one_but_for_the_two_known_differences(caikit: dict) -> None:
    theirs = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(caikit["descriptor"]))
    ours = descriptor_pb2.FileDescriptorProto.FromString(generation_pb2.DESCRIPTOR.serialized_pb)
    assert ours.service == theirs.service
    our_fields, their_fields = _flatten(ours), _flatten(theirs)
    tokenize = "BatchedTokenizeRequest"
    assert set(our_fields) - set(their_fields) == {f"{tokenize}.prefix_id", f"{tokenize}.adapter_id"}
    assert set(their_fields) <= set(our_fields)
    differing = {name for name, shape in their_fields.items() if our_fields[name] != shape}
    assert differing == {"SamplingParameters.temperature"}
    assert len(their_fields) > 80


def _flatten(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple]:
    """Every field and enum value by its full name, with all that matters on the wire."""
    shapes: dict[str, tuple] = {}

    def visit_enum(prefix: str, enum: descriptor_pb2.EnumDescriptorProto) -> None:
        shapes.update({f"{prefix}{enum.name}.{value.name}": (value.number,) for value in enum.value})

    def visit(prefix: str, message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            is_real_oneof = field.HasField("oneof_index") and not field.proto3_optional
            oneof = message.oneof_decl[field.oneof_index].name if is_real_oneof else ""
            shapes[f"{prefix}{message.name}.{field.name}"] = (
                field.number,
                field.label,
                field.type,
                field.type_name,
                field.proto3_optional,
                oneof,
            )
        for nested in message.nested_type:
            visit(f"{prefix}{message.name}.", nested)
        for enum in message.enum_type:
            visit_enum(f"{prefix}{message.name}.", enum)

    for message in file.message_type:
        visit("", message)
    for enum in file.enum_type:
        visit_enum("", enum)
    return shapes


def test_a_client_built_from_reflection_alone_generates(server: LiveServer) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    ask = reflection_pb2.ServerReflectionRequest
    listed, found = stub.ServerReflectionInfo(
        iter([ask(list_services=""), ask(file_containing_symbol="fmaas.GenerationService")])
    )
    names = {service.name for service in listed.list_services_response.service}
    assert names == {"fmaas.GenerationService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    pool = descriptor_pool.DescriptorPool()
    for file in found.file_descriptor_response.file_descriptor_proto:
        pool.AddSerializedFile(file)
    method = pool.FindServiceByName("fmaas.GenerationService").methods_by_name["Generate"]
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    call = server.channel.unary_unary(
        "/fmaas.GenerationService/Generate", request_class.SerializeToString, response_class.FromString
    )
    request = request_class()
    request.requests.add(text="hello")
    assert call(request, timeout=20).responses[0].text == "hello"


def test_the_admin_port_has_no_reflection(server: LiveServer) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.admin_channel)
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_generated_code_is_what_the_protos_give() -> None:
    command = [sys.executable, str(REPOSITORY / "proto" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_our_own_protos_pass_buf_lint() -> None:
    buf = shutil.which("buf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert buf is not None, "buf is missing: run `make setup`"
    done = subprocess.run([buf, "lint", "proto"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
