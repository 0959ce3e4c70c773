"""Where the tests find the linters, and what the command line of `graft` makes of a container's arguments."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.cli import build_parser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def run_linter(name: str, *arguments: str | Path) -> str:
    """What a linter of the dev extra says; empty if it has nothing to say."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which(name, path=path)
    if program is None:
        raise FileNotFoundError(f"{name} is not installed: it belongs to the dev extra (pip install -e '.[dev]')")
    done = subprocess.run([program, *arguments], capture_output=True, check=False, text=True, timeout=60)
    said = (done.stdout + done.stderr).strip()
    return said or ("" if done.returncode == 0 else f"{name} ended with {done.returncode}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of `graft`; raises ValueError with argparse's message if a flag or value does not exist."""
    parser = build_parser()
    _refuse_abbreviations(parser)
    try:
        return parser.parse_args(arguments)
    except SystemExit as error:
        raise ValueError(f"graft {' '.join(arguments)}: refused") from error


def _refuse_abbreviations(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _refuse_abbreviations(inner)


def serve_defaults() -> argparse.Namespace:
    """The options of `graft serve` without arguments."""
    return parse(["serve"])


def own_variables() -> set[str]:
    """The environment variables that `runtime.env` reads, or sets for processes that it starts."""
    source = (ROOT / "runtime" / "env.py").read_text(encoding="utf-8")
    return set(re.findall(r'"([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)"', source))
