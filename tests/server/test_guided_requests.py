"""Guided decoding over the wire: the client's fields, the processes beside the engine, and the errors of both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import jsonschema
import pytest

from runtime.pb.fmaas import generation_pb2 as pb
from tests.server.live import LiveServer, refused

RECORD = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}, "n": {"enum": [1, 2]}},
          "required": ["city", "n"], "additionalProperties": False}  # fmt: skip
BOMB = "start: A\nA: " + " & ".join(f"/.*a.{{{count}}}/" for count in range(1, 600))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root: Path = tmp_path_factory.mktemp("root")
    with LiveServer.demo(root) as live:
        yield live


def _request(decoding: pb.DecodingParameters, max_new_tokens: int = 300) -> pb.BatchedGenerationRequest:
    params = pb.Parameters(decoding=decoding, stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens))
    return pb.BatchedGenerationRequest(requests=[pb.GenerationRequest(text="Anna lives in")], params=params)


def _text(server: LiveServer, decoding: pb.DecodingParameters) -> str:
    (response,) = server.generation.Generate(_request(decoding), timeout=60).responses
    assert response.stop_reason == pb.StopReason.EOS_TOKEN
    return response.text


def test_each_kind_of_guide_is_followed(server: LiveServer) -> None:
    choices = ['say "hi"', "two\nlines", "漢字"]
    jsonschema.validate(json.loads(_text(server, pb.DecodingParameters(json_schema=json.dumps(RECORD)))), RECORD)
    assert re.fullmatch(r"[a-z]{3}-\d\d", _text(server, pb.DecodingParameters(regex=r"[a-z]{3}-\d\d")))
    choice = pb.DecodingParameters.StringChoices(choices=choices)
    assert _text(server, pb.DecodingParameters(choice=choice)) in choices
    lark, gbnf = 'start: "(" ("[" /[0-9]/ "]" | "x") ")"', 'root ::= "x" [0-9]{2}\n'
    assert re.fullmatch(r"\((\[[0-9]\]|x)\)", _text(server, pb.DecodingParameters(grammar=lark)))
    assert re.fullmatch("x[0-9]{2}", _text(server, pb.DecodingParameters(grammar=gbnf)))


def test_any_json_object_begins_as_one(server: LiveServer) -> None:
    request = _request(pb.DecodingParameters(format=pb.DecodingParameters.JSON), max_new_tokens=10)
    (response,) = server.generation.Generate(request, timeout=60).responses
    assert response.text.startswith("{")


@pytest.mark.parametrize(
    ("decoding", "reason", "field"),
    [
        (pb.DecodingParameters(regex="(a"), "GUIDE_INVALID", "params.decoding.regex"),
        (pb.DecodingParameters(json_schema='{"not": {}}'), "GUIDE_INVALID", "params.decoding.json_schema"),
        (pb.DecodingParameters(grammar=BOMB), "GUIDE_TOO_COMPLEX", "params.decoding.grammar"),
    ],
)
def test_a_guide_that_cannot_be_followed_is_refused_with_its_field_while_others_stream(
    server: LiveServer, decoding: pb.DecodingParameters, reason: str, field: str
) -> None:
    stream = server.stream("Once", stopping=pb.StoppingCriteria(max_new_tokens=1000, min_new_tokens=1000))
    next(stream)
    seen = refused(lambda: _text(server, decoding))
    assert seen == (grpc.StatusCode.INVALID_ARGUMENT, reason, field)
    assert next(stream).stop_reason == pb.StopReason.NOT_FINISHED
    stream.cancel()
