"""Write docs/api.md from the .proto files and their comments: `python proto/reference.py [--check]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
REFERENCE = PROTO_DIR.parent / "docs" / "api.md"
INTRODUCTION = """# API reference

Written by `make proto` from the comments in [`proto/`](../proto/); `make lint` fails if the two differ.

| Port | Services | For |
|---|---|---|
| generation, 8033 | fmaas [`GenerationService`](#generationservice), `grpc.health.v1.Health`, reflection | clients |
| admin, 8034, loopback | graft.admin.v1 [`AdapterService`](#adapterservice) and [`ServerService`](#serverservice), \
`grpc.health.v1.Health` | operators, `graft adapters` and `graft server` |
| HTTP, 8035 | `/metrics`, `/healthz`, `/readyz`, `/v1/models` | Prometheus, probes, routers |

- **Errors** are gRPC statuses with google.rpc details: one `ErrorInfo` (domain `graft`) whose reason stands in
  [errors.md](errors.md), and `BadRequest`, `QuotaFailure`, `RetryInfo` or `PreconditionFailure` where they help.
- **Limits** of a request are listed under [`Limits`](#limits), and told by GetServerInfo and `graft server info`.
- **Metadata**: a generation call may carry `x-correlation-id`, 1 to 128 printable ASCII characters, anything else being
  refused; of several the last counts. It comes back beside the server's own `x-request-id`: before the first message of
  a stream, and as trailing metadata of every call. Nothing is sent before a call is admitted, so that a client's retry
  policy may retry UNAVAILABLE and RESOURCE_EXHAUSTED; `grpc-retry-pushback-ms` tells it when, or that it should not.
- **Deadlines**: a generation call whose deadline is nearer than the queue's estimated wait is refused at once.
- **Health**: `""` is NOT_SERVING when the process should be restarted (its engine hangs); a service's name is SERVING
  while that service takes calls.
"""
# A comment's place is a path of field numbers and indices from the file down (descriptor.proto, SourceCodeInfo).
Location = tuple[int, ...]
SYNTAX = (FileDescriptorProto.SYNTAX_FIELD_NUMBER,)
SERVICES = FileDescriptorProto.SERVICE_FIELD_NUMBER
MESSAGES = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER
ENUMS = FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER
METHODS = ServiceDescriptorProto.METHOD_FIELD_NUMBER
FIELDS = DescriptorProto.FIELD_FIELD_NUMBER
ONEOFS = DescriptorProto.ONEOF_DECL_FIELD_NUMBER
NESTED_MESSAGES = DescriptorProto.NESTED_TYPE_FIELD_NUMBER
NESTED_ENUMS = DescriptorProto.ENUM_TYPE_FIELD_NUMBER
VALUES = EnumDescriptorProto.VALUE_FIELD_NUMBER


class FileReference:
    """The part of one .proto file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(place.path): " ".join([*place.leading_detached_comments, place.leading_comments])
            if tuple(place.path) == SYNTAX
            else place.leading_comments
            for place in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        """Markdown: services first, then messages and enums in the order of the file."""
        yield from (f"## {self._file.package}: {Path(self._file.name).name}", "", self._text(SYNTAX), "")
        for index, service in enumerate(self._file.service):
            yield from self._service(service, (SERVICES, index))
        for index, message in enumerate(self._file.message_type):
            yield from self._message(message, (MESSAGES, index), "")
        for index, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (ENUMS, index), "")

    def _service(self, service: ServiceDescriptorProto, at: Location) -> Iterator[str]:
        yield from self._heading(service.name, at)
        for index, method in enumerate(service.method):
            answer = f"{'stream of ' if method.server_streaming else ''}{_link(method.output_type)}"
            yield from (f"**{method.name}**: {_link(method.input_type)} → {answer}", "")
            yield from (self._text((*at, METHODS, index)), "")

    def _message(self, message: DescriptorProto, at: Location, prefix: str) -> Iterator[str]:
        name = prefix + message.name
        yield from self._heading(name, at)
        rows = []
        for index, field in enumerate(message.field):
            meaning = self._text((*at, FIELDS, index))
            if field.HasField("oneof_index") and not field.proto3_optional:
                meaning += f" (`{message.oneof_decl[field.oneof_index].name}`)"
            rows.append((f"`{field.name}`", str(field.number), _type_of(field), meaning))
        yield from _table(("Field", "Number", "Type", "Meaning"), rows) if rows else ("No fields.", "")
        for index, oneof in enumerate(message.oneof_decl):
            if about := self._text((*at, ONEOFS, index)):
                yield from (f"At most one field of `{oneof.name}` is set. {about}", "")
        for index, nested in enumerate(message.nested_type):
            yield from self._message(nested, (*at, NESTED_MESSAGES, index), f"{name}.")
        for index, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*at, NESTED_ENUMS, index), f"{name}.")

    def _enum(self, enum: EnumDescriptorProto, at: Location, prefix: str) -> Iterator[str]:
        yield from self._heading(prefix + enum.name, at)
        rows = [
            (f"`{value.name}`", str(value.number), self._text((*at, VALUES, index)) or "No value.")
            for index, value in enumerate(enum.value)
        ]
        yield from _table(("Value", "Number", "Meaning"), rows)

    def _heading(self, name: str, at: Location) -> Iterator[str]:
        yield from (f"### {name}", "")
        if text := self._text(at):
            yield from (text, "")

    def _text(self, at: Location) -> str:
        return " ".join(self._comments.get(at, "").split())


def reference(files: Sequence[FileDescriptorProto]) -> str:
    """The whole page; raises SystemExit if two headings would have the same anchor."""
    lines = [INTRODUCTION]
    for file in files:
        lines.extend(FileReference(file).lines())
    headings = [line for line in lines if line.startswith("### ")]
    if len({_anchor(heading[4:]) for heading in headings}) < len(headings):
        raise SystemExit("two messages have the same name: give the headings of docs/api.md their packages")
    return "\n".join(lines).rstrip() + "\n"


def read_protos() -> list[FileDescriptorProto]:
    """Every .proto of this folder with its comments, in the order of the paths."""
    names = sorted(path.relative_to(PROTO_DIR).as_posix() for path in PROTO_DIR.rglob("*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        flags = [f"-I{PROTO_DIR}", f"-I{well_known}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *flags, *names]) != 0:
            raise SystemExit("protoc failed")
        files = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    return [files[name] for name in names]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for row in rows:
        cells = [cell.replace("|", r"\|") for cell in row]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _type_of(field: FieldDescriptorProto) -> str:
    scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name) if field.type_name else scalar
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    """A link to a message of ours, or the bare name of one of Google's; `type_name` is `.package.Outer.Inner`."""
    parts = type_name.strip(".").split(".")
    name = ".".join(part for part in parts if part[:1].isupper())
    return name if parts[0] == "google" else f"[{name}](#{_anchor(name)})"


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "")


def main() -> int:
    """Write the page, or with --check only compare it with what is committed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs/api.md is out of date")
    arguments = parser.parse_args()
    text = reference(read_protos())
    if REFERENCE.exists() and REFERENCE.read_text(encoding="utf-8") == text:
        return 0
    if not arguments.check:
        REFERENCE.write_text(text, encoding="utf-8")
    print(f"{'out of date' if arguments.check else 'written'}: docs/{REFERENCE.name}")
    return int(arguments.check)


if __name__ == "__main__":
    sys.exit(main())
