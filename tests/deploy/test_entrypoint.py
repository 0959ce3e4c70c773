"""The entrypoint of the Ascend image, run with a CANN of our own making."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.programs import DEPLOY, run_linter

ENTRYPOINT = DEPLOY / "docker" / "ascend-entrypoint.sh"
GRAFT = """#!/bin/bash
printf "%s\\n" "pid $$" "path ${LD_LIBRARY_PATH}" "cann ${CANN:-}" "nnal ${NNAL:-}" "$@"
exit 7
"""


@pytest.fixture
def cann(tmp_path: Path) -> Path:
    """A folder like /usr/local/Ascend, with CANN, NNAL and a `graft` that tells how it was started and exits with 7."""
    for folder in ("cann-9", "nnal/atb", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    # The vendor's scripts read unset variables and may end with a command that failed.
    script = 'export CANN="arguments: $#"\n[ -z "${UNSET_BY_ALL}" ]\nexport LD_LIBRARY_PATH=/cann\nfalse\n'
    (tmp_path / "cann-9" / "set_env.sh").write_text(script, encoding="utf-8")
    (tmp_path / "nnal" / "atb" / "set_env.sh").write_text('export NNAL="${BASH_SOURCE[0]}"\n', encoding="utf-8")
    graft = tmp_path / "bin" / "graft"
    graft.write_text(GRAFT, encoding="utf-8")
    graft.chmod(0o755)
    return tmp_path


def _start(folder: Path, home: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "ASCEND_HOME_PATH": home}
    command = ["/bin/bash", str(ENTRYPOINT), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_sources_cann_and_nnal_and_becomes_graft_with_all_arguments(cann: Path) -> None:
    started = _start(cann, str(cann / "cann-9"), "serve", "a b", "--cxx_abi=1")
    out, errors = started.communicate(timeout=20)
    pid, path, cann_line, nnal, *arguments = out.splitlines()
    assert (started.returncode, errors) == (7, "")
    assert pid == f"pid {started.pid}", "graft runs as a child, so signals do not reach it"
    assert path.startswith("path /cann:/usr/local/Ascend/driver/lib64:")
    assert cann_line == "cann arguments: 0", "CANN's script sees graft's arguments"
    assert nnal == f"nnal {cann}/nnal/atb/set_env.sh"
    assert arguments == ["serve", "a b", "--cxx_abi=1"]


def test_it_finds_the_script_beside_the_home_folder_as_in_older_releases(cann: Path) -> None:
    (cann / "cann-9" / "latest").mkdir()
    out, errors = _start(cann, str(cann / "cann-9" / "latest"), "--version").communicate(timeout=20)
    assert (out.splitlines()[2:4], errors) == (["cann arguments: 0", f"nnal {cann}/nnal/atb/set_env.sh"], "")


def test_it_goes_without_nnal(cann: Path) -> None:
    (cann / "nnal" / "atb" / "set_env.sh").unlink()
    out, _ = _start(cann, str(cann / "cann-9"), "--version").communicate(timeout=20)
    assert out.splitlines()[3:] == ["nnal ", "--version"]


def test_it_ends_with_a_sentence_where_there_is_no_cann(cann: Path) -> None:
    started = _start(cann, "/nowhere/cann", "serve")
    out, errors = started.communicate(timeout=20)
    assert (started.returncode, out) == (1, "")
    assert "there is no CANN at /nowhere/cann/set_env.sh" in errors
    assert "ASCEND_HOME_PATH" in errors


def test_it_is_an_executable_script_that_ends_in_exec() -> None:
    assert subprocess.run(["/bin/bash", "-n", str(ENTRYPOINT)], check=False).returncode == 0
    assert ENTRYPOINT.stat().st_mode & 0o111
    assert ENTRYPOINT.read_text(encoding="utf-8").splitlines()[-1] == 'exec graft "$@"'


def test_shellcheck_has_nothing_to_say() -> None:
    assert run_linter("shellcheck", ENTRYPOINT) == ""
