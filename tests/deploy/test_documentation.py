"""docs/deployment.md and the comments of the compose file, against the command line and the Dockerfiles."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.deploy.dockerfile import arguments, read_dockerfile
from tests.deploy.manifests import FOLDERS, container_of, options_of, pod_of
from tests.deploy.programs import DEPLOY, ROOT, parse

PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMAND = re.compile(r"\bgraft(?::[a-z0-9.-]+)? ((?:serve|adapters|server|generate)\b[^#\n]*)")
COMMANDS = COMMAND.findall(BLOCKS + "\n" + COMPOSE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_knows_every_command_of_the_page(command: str) -> None:
    assert parse(shlex.split(command)).command


def test_the_commands_were_found() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"serve", "adapters", "server", "generate"}


def test_the_table_of_build_arguments_is_complete() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)`[^|]*\| `?([^|`]+?)`? \|", PAGE.split("## On one host")[0], re.MULTILINE))
    for path in (DEPLOY / "docker").glob("*.Dockerfile"):
        for name, default in arguments(read_dockerfile(path)).items():
            assert rows[name] in (default, "PyTorch's CPU index"), name


def test_the_variables_of_the_ascend_overlay_are_explained() -> None:
    for variable in container_of("ascend")["env"]:
        row = next(line for line in PAGE.splitlines() if line.startswith("|") and f"`{variable['name']}`" in line)
        assert variable["value"] in row


@pytest.mark.parametrize("name", FOLDERS)
def test_the_times_of_a_drain_are_those_of_the_manifests(name: str) -> None:
    options = options_of(name)
    assert f"`DRAIN_DELAY` ({options.drain_delay:g} s)" in PAGE
    assert f"`DRAIN_TIMEOUT` ({options.drain_timeout:g} s)" in PAGE
    assert f"--stop-timeout {pod_of(name)['terminationGracePeriodSeconds']} " in PAGE


def test_the_memory_table_is_about_the_settings_of_the_overlay() -> None:
    options = options_of("ascend")
    assert f"`KV_CACHE_TOKENS` {options.kv_cache_tokens:,} x" in PAGE
    assert f"| `ADAPTER_MEMORY_GIB` | {options.adapter_memory_gib:g} |" in PAGE
