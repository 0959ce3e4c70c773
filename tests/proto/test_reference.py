"""docs/api.md says all that the protos say, and docs/errors.md names every reason that a client can meet."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

ROOT = Path(__file__).parents[2]
SENT = ("runtime/server", "runtime/engine", "runtime/adapters", "loaders")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """proto/reference.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "proto" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(script: ModuleType) -> str:
    return script.reference(script.read_protos())


def test_the_committed_page_is_what_the_protos_give(page: str) -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == page, "run `make proto`"


def test_the_check_fails_when_a_comment_has_changed(tmp_path: Path) -> None:
    for folder in ("proto", "docs"):
        subprocess.run(["cp", "-r", str(ROOT / folder), str(tmp_path)], check=True)
    command = [sys.executable, str(tmp_path / "proto" / "reference.py")]
    run = {"capture_output": True, "text": True, "timeout": 60}
    assert subprocess.run([*command, "--check"], **run).returncode == 0
    proto = tmp_path / "proto" / "fmaas" / "generation.proto"
    proto.write_text(proto.read_text().replace("// How to answer, the same", "// How to reply, the same"))
    done = subprocess.run([*command, "--check"], **run)
    assert (done.returncode, done.stdout) == (1, "out of date: docs/api.md\n")
    assert subprocess.run(command, **run).returncode == 0
    assert "How to reply, the same for all prompts." in (tmp_path / "docs" / "api.md").read_text()


def rows(page: str) -> dict[str, list[list[str]]]:
    """The tables' rows by the heading above them."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def messages(file: FileDescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
    def visit(message: DescriptorProto, prefix: str) -> Iterator[tuple[str, DescriptorProto]]:
        yield prefix + message.name, message
        for nested in message.nested_type:
            yield from visit(nested, f"{prefix}{message.name}.")

    for message in file.message_type:
        yield from visit(message, "")


def test_every_service_call_field_and_value_stands_there_with_a_meaning(script: ModuleType, page: str) -> None:
    tables, num_fields = rows(page), 0
    for file in script.read_protos():
        for service in file.service:
            assert f"### {service.name}\n" in page
            for method in service.method:
                after = page.split(f"**{method.name}**: ")[1].split("\n\n")
                assert len(after[1]) > 20, method.name
        for name, message in messages(file):
            seen = {row[0].strip("`"): row for row in tables.get(name, [])}
            for field in message.field:
                _, number, kind, meaning = seen[field.name]
                assert number == str(field.number) and kind and len(meaning) > 4, (name, field.name)
                num_fields += 1
            enums = [(f"{name}.{enum.name}", enum) for enum in message.enum_type]
            for enum_name, enum in enums:
                assert [row[:2] for row in tables[enum_name]] == [[f"`{v.name}`", str(v.number)] for v in enum.value]
                assert all(len(row[2]) > 4 for row in tables[enum_name])
    assert num_fields > 150


def test_every_link_of_the_page_leads_to_a_heading(page: str) -> None:
    headings = {line.lstrip("# ").lower().replace(".", "") for line in page.splitlines() if line.startswith("### ")}
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert links - headings == set() and len(links) > 30
    for target in re.findall(r"\]\(([^#)]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target


def reasons() -> dict[str, str]:
    """Every reason that the code of the server gives an error, and where."""
    found = {}
    for path in (path for folder in SENT for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            if ast.unparse(node.func).endswith("invalid"):
                given += node.args[:1]
            for value in given:
                if isinstance(value, ast.Constant) and re.fullmatch(r"[A-Z][A-Z_]+", str(value.value)):
                    found[value.value] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_reason_is_explained_and_no_other() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    explained = {word for cell in cells for word in re.findall(r"`([A-Z_]+)`", cell)}
    given = reasons()
    assert len(given) > 25
    missing = {reason: place for reason, place in given.items() if reason not in explained}
    assert missing == {}, "explain them in docs/errors.md"
    assert explained - set(given) == set(), "nothing gives these reasons any more"
