"""The client's choice of guided decoding as a GuideSpec; whether it can be compiled, the engine finds out."""

from __future__ import annotations

import json

from runtime.engine.sampling_params import GuideKind, GuideSpec
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server.limits import Limits
from runtime.server.refusal import invalid, require

ANY_JSON_OBJECT = '{"type": "object"}'


def validate_guide(decoding: pb.DecodingParameters, limits: Limits) -> GuideSpec | None:
    """What the text must follow, None for free text; raises InvalidRequest with the field's path."""
    match decoding.WhichOneof("guided"):
        case "format":
            return _format(decoding.format)
        case "json_schema":
            _check_source(decoding.json_schema, "json_schema", limits)
            _check_json_schema(decoding.json_schema)
            return GuideSpec(GuideKind.JSON_SCHEMA, decoding.json_schema)
        case "regex":
            _check_source(decoding.regex, "regex", limits)
            return GuideSpec(GuideKind.REGEX, decoding.regex)
        case "grammar":
            _check_source(decoding.grammar, "grammar", limits)
            return GuideSpec(GuideKind.GRAMMAR, decoding.grammar)
        case "choice":
            return _choice(list(decoding.choice.choices), limits)
    return None


def _format(value: int) -> GuideSpec | None:
    known = (pb.DecodingParameters.TEXT, pb.DecodingParameters.JSON)
    require(value in known, "params.decoding.format", value, "TEXT (0) or JSON (1)")
    return GuideSpec(GuideKind.JSON_SCHEMA, ANY_JSON_OBJECT) if value == pb.DecodingParameters.JSON else None


def _choice(choices: list[str], limits: Limits) -> GuideSpec:
    field = "params.decoding.choice"
    require(1 <= len(choices) <= limits.max_choices, f"{field}.choices", len(choices), f"1..{limits.max_choices} texts")
    for index, choice in enumerate(choices):
        if not choice:
            raise invalid("INVALID_PARAMETER", f"{field}.choices[{index}]", "a choice must not be empty")
    source = json.dumps(choices)
    _check_source(source, "choice", limits)
    return GuideSpec(GuideKind.CHOICE, source)


def _check_source(source: str, name: str, limits: Limits) -> None:
    num_bytes = len(source.encode())
    require(
        1 <= num_bytes <= limits.max_guide_bytes,
        f"params.decoding.{name}",
        f"{num_bytes} bytes",
        f"1..{limits.max_guide_bytes} bytes",
    )


def _check_json_schema(source: str) -> None:
    field = "params.decoding.json_schema"
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise invalid("INVALID_PARAMETER", field, f"json_schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise invalid("INVALID_PARAMETER", field, f"json_schema must be a JSON object, not {type(schema).__name__}")
