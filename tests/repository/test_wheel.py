"""The wheel is what users install: it must build, carry its data files and run without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; its whole output is the failure message."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing left in the checkout by an earlier build gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("runtime", "loaders"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    _run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
        ".",
        cwd=source,
    )
    [built] = out.glob("graft_moe-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a fresh environment with the wheel in it.

    The dependencies are borrowed from this environment by a path entry, which does not run this environment's own
    .pth files: an editable install of Graft is not seen.
    """
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=True, symlinks=True)
    scripts = home / "bin"
    _run(scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    site = _run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return scripts


def test_the_wheel_carries_the_code_and_the_demo_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"runtime", "loaders"}
    in_demo = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "runtime" / "demo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_demo, "the demo has no files"
    assert in_demo <= set(names), f"left out: {sorted(in_demo - set(names))}"


def test_the_wheel_says_that_it_is_typed_and_how_it_is_licensed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "runtime/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_graft_help_runs_from_the_installed_wheel(installed: Path) -> None:
    where = _run(installed / "python", "-c", "import runtime; print(runtime.__file__)", cwd=installed).strip()
    assert Path(where).is_relative_to(installed.parent), f"runtime came from {where}"
    shown = _run(installed / "graft", "--help", cwd=installed)
    for command in ("serve", "generate", "adapters", "inspect", "demo"):
        assert command in shown
