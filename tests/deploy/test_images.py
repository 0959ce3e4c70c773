"""Dockerfiles and the compose file: against hadolint, the command line, and the project's own versions."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runtime.version import version
from tests.deploy.dockerfile import arguments, exec_form, read_dockerfile
from tests.deploy.programs import DEPLOY, ROOT, own_variables, parse, run_linter, serve_defaults

DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STOP_SECONDS = 15

each = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def _service() -> dict[str, Any]:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = compose["services"].values()
    return dict(service)


def _pins() -> dict[str, str]:
    lines = (DEPLOY / "docker" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_there_is_one_for_each_platform() -> None:
    assert [path.name for path in DOCKERFILES] == ["ascend.Dockerfile", "cpu.Dockerfile"]


@each
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    assert run_linter("hadolint", "--no-color", path) == ""


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nENTRYPOINT graft serve\n", encoding="utf-8")
    said = run_linter("hadolint", "--no-color", tmp_path / "Dockerfile")
    assert "DL3007" in said
    assert "DL3025" in said


@each
def test_the_entrypoint_is_graft_in_exec_form_and_the_command_line_knows_its_arguments(path: Path) -> None:
    instructions = read_dockerfile(path)
    (program,) = exec_form(instructions, "ENTRYPOINT")
    assert program in ("graft", "/usr/local/bin/ascend-entrypoint")
    if program != "graft":
        assert ("COPY", f"deploy/docker/ascend-entrypoint.sh {program}") in instructions
    options = parse(exec_form(instructions, "CMD"))
    assert (options.command, options.host) == ("serve", "0.0.0.0")
    assert options.device == ("cpu" if path.name == "cpu.Dockerfile" else "npu")


@each
def test_exposed_ports_are_the_public_ones_of_the_server(path: Path) -> None:
    (ports,) = (item.text for item in read_dockerfile(path) if item.name == "EXPOSE")
    defaults = serve_defaults()
    assert ports.split() == [str(defaults.grpc_port), str(defaults.http_port)]


@each
def test_the_user_is_not_root_and_is_the_one_of_the_manifests(path: Path) -> None:
    users = [item.text for item in read_dockerfile(path) if item.name == "USER"]
    deployment = (DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text(encoding="utf-8")
    numbers = re.findall(r"runAs(?:User|Group): (\d+)", deployment)
    assert users[-1:] == [":".join(numbers)]
    assert "0" not in numbers


@each
def test_the_base_image_has_a_fixed_tag(path: Path) -> None:
    instructions = read_dockerfile(path)
    (image,) = (item.text for item in instructions if item.name == "FROM")
    tag = re.sub(r"\$\{(\w+)\}", lambda found: arguments(instructions)[found[1]], image).partition(":")[2]
    assert re.match(r"\d+\.\d+", tag), f"{image}: {tag!r} is no version"


@each
def test_code_is_copied_after_what_it_needs_is_installed(path: Path) -> None:
    steps = [item.text for item in read_dockerfile(path) if item.name in ("RUN", "COPY")]
    code = next(index for index, step in enumerate(steps) if step.startswith(("COPY runtime", "runtime")))
    installs = [index for index, step in enumerate(steps) if "torch==" in step or "--requirement" in step]
    assert len(installs) == 2
    assert max(installs) < code


@each
def test_what_is_copied_exists_and_is_in_the_build_context(path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    sources = [source for item in read_dockerfile(path) if item.name == "COPY" for source in item.text.split()[:-1]]
    assert len(sources) >= 6
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in kept), source


def test_the_build_context_holds_all_that_the_package_is_built_from() -> None:
    sources = {
        str(PROJECT["readme"]),
        *PROJECT["license-files"],
        "pyproject.toml",
        *("runtime", "loaders"),
    }
    for path in DOCKERFILES:
        copied = {source for item in read_dockerfile(path) if item.name == "COPY" for source in item.text.split()[:-1]}
        assert sources <= copied


def test_every_dependency_is_pinned_to_a_version_that_the_project_accepts() -> None:
    torch = {arguments(read_dockerfile(path))["TORCH_VERSION"] for path in DOCKERFILES}
    assert len(torch) == 1
    pins = {**_pins(), "torch": torch.pop()}
    for dependency in map(Requirement, PROJECT["dependencies"]):
        pinned = pins.get(canonicalize_name(dependency.name))
        assert pinned is not None, f"{dependency.name} is not in requirements.txt"
        assert dependency.specifier.contains(pinned), f"{dependency} and the pin {pinned}"
    torch_npu = pins["torch"]  # the Ascend Dockerfile installs it at TORCH_VERSION
    assert PROJECT["optional-dependencies"]["npu"] == [f"torch=={pins['torch']}", f"torch_npu=={torch_npu}"]


def test_compose_builds_the_cpu_image_under_the_projects_version() -> None:
    service = _service()
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DOCKERFILES[1]
    assert service["image"] == f"graft:cpu-{version()}"


def test_compose_passes_what_the_command_line_and_the_environment_know() -> None:
    service = _service()
    options = parse(service["command"])
    assert (options.command, options.model, options.host) == ("serve", None, "0.0.0.0")
    assert set(service["environment"]) <= own_variables()
    (mount,) = service["volumes"]
    source, target, mode = mount.split(":")
    assert (target, mode) == (str(options.adapters_root), "ro")
    assert list((DEPLOY / source).resolve().glob("date-iso/adapter_config.json")), "the adapter of the file's example"


def test_compose_opens_only_the_public_ports_and_only_on_loopback() -> None:
    options = parse(_service()["command"])
    expected = [f"127.0.0.1:{port}:{port}" for port in (options.grpc_port, options.http_port)]
    assert _service()["ports"] == expected


def test_compose_gives_the_server_time_to_drain() -> None:
    assert _service()["stop_grace_period"].endswith("s")
    grace = float(_service()["stop_grace_period"][:-1])
    assert grace >= parse(_service()["command"]).drain_timeout + STOP_SECONDS


def test_the_health_check_of_compose_follows_readyz(http_server: tuple[int, list[int]]) -> None:
    """Its one line of Python, with the port replaced by that of a server that answers what we say."""
    port, answer = http_server
    kind, program, *words = _service()["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    assert f"127.0.0.1:{parse(_service()['command']).http_port}/readyz" in words[-1]
    words[-1] = words[-1].replace("127.0.0.1:8035", f"127.0.0.1:{port}")
    codes = []
    for answer[0] in (200, 503):
        codes.append(subprocess.run(["python3", *words], check=False, capture_output=True, timeout=20).returncode)
    assert codes == [0, 1]
