"""`graft train --publish`: the adapter of the run serves at once, or a sentence says why it does not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.server.live import LiveServer
from tests.trainer.runs.demo import DEMO, Graft, write_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    shutil.copytree(DEMO / "adapters" / "date-iso", root / "date-iso")
    with LiveServer.demo(root) as live:
        yield live


def publish(graft: Graft, folder: Path, rows: Path, address: str, name: str, *flags: str) -> tuple[int, str, list[str]]:
    """Train into `folder`/out and publish that."""
    config = write_config(folder / "run.yaml", rows, folder / "out", optimizer={"lr": 1e-2}, steps=2, save_every=0)
    said = graft("train", config, "--publish", address, "--name", name, *flags)
    return said.status, said.out, said.messages


def test_a_trained_adapter_is_loaded_and_its_generation_printed(
    graft: Graft, server: LiveServer, root: Path, rows: Path
) -> None:
    (root / "runs").mkdir()
    status, out, messages = publish(graft, root / "runs", rows, server.admin_address, "mine")
    assert (status, messages) == (0, [])
    adapter = server.adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/mine"), timeout=10).adapter
    assert f"mine: generation {adapter.generation} on {server.admin_address}, {adapter.digest}" in out
    assert adapter.source_path == "runs/out/adapter" and re.fullmatch(r"sha256:[0-9a-f]{64}", adapter.digest)
    assert server.generate("x", "mine", stopping={"max_new_tokens": 1}).generated_token_count == 1


def test_an_adapter_that_lies_elsewhere_is_not_published(
    graft: Graft, server: LiveServer, tmp_path: Path, rows: Path
) -> None:
    status, _, messages = publish(graft, tmp_path, rows, server.admin_address, "elsewhere")
    assert status == 1 and len(messages) == 1
    assert messages[0].startswith(f"graft: {tmp_path}/out/adapter was trained, but not published: ")
    assert "its folder must lie below the server's adapters root" in messages[0]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_name_that_stands_for_another_adapter_is_not_taken_from_it(
    graft: Graft, server: LiveServer, root: Path, rows: Path
) -> None:
    server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="taken", source_path="date-iso"), timeout=60)
    (root / "taken").mkdir()
    status, _, messages = publish(graft, root / "taken", rows, server.admin_address, "taken")
    assert status == 1 and len(messages) == 1
    assert messages[0].startswith("graft: nothing was trained, since the name 'taken' stands for another adapter on ")
    assert "choose another --name, or: graft adapters unload taken" in messages[0]
    assert not (root / "taken" / "out").exists()
    adapter = server.adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/taken"), timeout=10).adapter
    assert adapter.source_path == "date-iso"


@pytest.mark.parametrize(
    ("address", "name", "words"),
    [
        ("127.0.0.1:1", "mine", "could not be published: no server answers at 127.0.0.1:1; check --publish and --name"),
        ("127.0.0.1:1", "0.5*a+b", "--name '0.5*a+b' must match "),
        ("127.0.0.1:1", "mine@3", "--name 'mine@3' must match "),
    ],
)
def test_a_server_or_a_name_that_cannot_be_is_told_before_anything_is_trained(
    graft: Graft, tmp_path: Path, rows: Path, address: str, name: str, words: str
) -> None:
    status, _, messages = publish(graft, tmp_path, rows, address, name)
    assert status == 1 and len(messages) == 1 and words in messages[0]
    assert not (tmp_path / "out").exists()


def test_a_server_that_goes_while_a_run_trains_is_named_and_the_adapter_stays(
    graft: Graft, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.commands.publish.check_can_publish", lambda address, name: None)
    status, _, messages = publish(graft, tmp_path, rows, "127.0.0.1:1", "mine")
    assert status == 1 and len(messages) == 1
    assert "was trained, but not published: no server answers at 127.0.0.1:1" in messages[0]
    assert "graft adapters load mine" in messages[0]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
