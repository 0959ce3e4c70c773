"""A Dockerfile as a list of instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction, its continued lines joined."""

    name: str
    text: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """All instructions of a file, comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    parts = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [Instruction(name.upper(), " ".join(text.split())) for name, text in parts]


def arguments(instructions: list[Instruction]) -> dict[str, str]:
    """The build arguments and their defaults."""
    return dict(item.text.split("=", 1) for item in instructions if item.name == "ARG")


def exec_form(instructions: list[Instruction], name: str) -> list[str]:
    """The words of the one ENTRYPOINT or CMD; raises ValueError if it is not in exec form."""
    (found,) = (item.text for item in instructions if item.name == name)
    if not found.startswith("["):
        raise ValueError(f"{name} {found}: runs below a shell, which keeps signals for itself")
    return list(json.loads(found))
