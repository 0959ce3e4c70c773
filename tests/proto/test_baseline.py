"""`make lint` refuses a change of the contracts that would break a client, and any change of the frozen one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FMAAS, SERVER = Path("fmaas/generation.proto"), Path("graft/admin/v1/server.proto")


def recipe(target: str) -> list[str]:
    """The commands of a target in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    body = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert body is not None, f"the Makefile has no target {target}"
    return [line.strip() for line in body[1].splitlines()]


def run(commands: list[str], folder: Path) -> tuple[int, str]:
    """The status of the first command that fails, else 0, and what all of them said."""
    said = ""
    for command in commands:
        line = command.replace("$(BIN)", str(Path(sys.executable).parent))
        done = subprocess.run(line.split(), cwd=folder, capture_output=True, text=True, timeout=60)
        said += done.stdout + done.stderr
        if done.returncode:
            return done.returncode, said
    return 0, said


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of proto/ in a folder of its own."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def change(tree: Path, proto: Path, old: str, new: str) -> None:
    path = tree / "proto" / proto
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_lint_checks_for_breaks_and_the_contracts_have_none(tree: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("lint", "proto-baseline"):
        assert "proto-unbroken" in re.search(rf"^{target}:.*$", makefile, re.MULTILINE)[0]
    assert run(recipe("proto-unbroken"), tree) == (0, "")


@pytest.mark.parametrize(
    ("proto", "old", "new", "complaint"),
    [
        (SERVER, "bool stalled = 5;", "bool stalled = 50;", 'Previously present field "5" with name "stalled"'),
        (SERVER, "  string dtype = 7;\n", "", 'Previously present field "7" with name "dtype"'),
        (SERVER, "int64 step_count = 8;", "string step_count = 8;", "changed type"),
        (SERVER, "PHASE_COMPLETE = 3;", "PHASE_COMPLETE = 4;", 'Previously present enum value "3"'),
        (SERVER, "  rpc Abort(AbortRequest) returns (AbortResponse);\n", "", 'Previously present RPC "Abort"'),
        (FMAAS, "uint32 top_n_tokens = 6;", "uint32 top_n_tokens = 7;", 'Previously present field "6"'),
        (FMAAS, "  uint32 top_n_tokens = 6;\n", "", 'Previously present field "6"'),
        (FMAAS, "uint32 top_n_tokens = 6;", "uint32 top_n_tokens = 6;\n  bool extra = 7;", 'with name "extra"'),
        (FMAAS, "  ERROR = 7;", "  ERROR = 7;\n  BORED = 8;", 'enum value "8"'),
    ],
)
def test_a_change_that_breaks_a_client_is_refused(
    tree: Path, proto: Path, old: str, new: str, complaint: str
) -> None:
    change(tree, proto, old, new)
    status, said = run(recipe("proto-unbroken"), tree)
    assert status and complaint in said


def test_our_own_contracts_may_grow_and_what_was_added_is_then_kept(tree: Path) -> None:
    old, new = "bool stalled = 5;", "bool stalled = 5;\n  bool extra = 99;"
    change(tree, SERVER, old, new)
    assert run([*recipe("proto-unbroken"), *recipe("proto-baseline")], tree) == (0, "")
    change(tree, SERVER, "\n  bool extra = 99;", "")
    status, said = run(recipe("proto-unbroken"), tree)
    assert status and 'field "99" with name "extra"' in said


def test_the_baseline_is_what_the_protos_are_now(tree: Path) -> None:
    """So that an addition is a promise from the change on that makes it."""
    committed = (ROOT / "proto" / "baseline.binpb").read_bytes()
    assert run(recipe("proto-baseline"), tree) == (0, "")
    assert (tree / "proto" / "baseline.binpb").read_bytes() == committed, "run `make proto-baseline`"
