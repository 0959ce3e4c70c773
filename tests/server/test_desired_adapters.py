"""Adapters that no call loaded: named on demand under the root, or listed in a manifest that the server follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.server.adapter_manifest import Entry, ManifestError, parse_manifest
from tests.server.live import REPOSITORY, LiveServer, eventually, refused

DEMO = REPOSITORY / "runtime" / "demo" / "adapters"
ISO, OTHER = "date-iso", "number-words"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for name in (ISO, OTHER):
        shutil.copytree(DEMO / name, folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    (folder / "no-adapter").mkdir()
    return folder


def _states(server: LiveServer) -> dict[str, str]:
    listed = server.adapters.ListAdapters(pb.ListAdaptersRequest()).adapters
    state = pb.Adapter.State.Name
    return {item.name.removeprefix("adapters/"): state(item.state).removeprefix("STATE_") for item in listed}


def _aliases(server: LiveServer) -> list[str]:
    return [item.alias for item in server.adapters.ListAliases(pb.ListAliasesRequest()).aliases]


def test_a_request_may_name_a_folder_that_nobody_loaded_if_the_server_allows_it(root: Path) -> None:
    with LiveServer.demo(root, "--adapters-on-demand") as server:
        server.generate("date: 3 May 2024 ->", ISO)
        assert _states(server) == {ISO: "READY"}
        for name, reason in (("no-adapter", "ADAPTER_NOT_FOUND"), ("..", "ADAPTER_ID_INVALID"),
                             ("broken", "ADAPTER_REFUSED"), ("nobody", "ADAPTER_NOT_FOUND")):  # fmt: skip
            assert refused(lambda: server.generate("x", name))[1] == reason  # noqa: B023
        server.generate("date: 3 May 2024 ->", ISO)
        server.generate("x", f"0.5*{ISO}+0.5*{OTHER}")
        assert OTHER in _states(server)
    with LiveServer.demo(root) as server:
        assert refused(lambda: server.generate("x", ISO))[1] == "ADAPTER_NOT_FOUND"


@pytest.fixture
def followed(root: Path, tmp_path: Path) -> Iterator[tuple[LiveServer, Path]]:
    file = tmp_path / "manifest.json"
    entries = [
        {"name": "one", "path": ISO, "pinned": True, "aliases": ["live"]},
        {"name": "bad", "path": "nowhere"},
        {"name": "two", "path": OTHER},
    ]
    file.write_text(json.dumps(entries))
    with LiveServer.demo(root, "--adapters-manifest", str(file)) as server:
        yield server, file


def test_the_manifest_is_there_at_the_start_and_followed_when_it_changes(followed: tuple[LiveServer, Path]) -> None:
    server, file = followed
    assert _states(server) == {"one": "READY", "two": "REGISTERED"}
    assert server.adapters.GetAdapter(pb.GetAdapterRequest(name="live")).adapter.pinned
    assert server.metric('graft_manifest_entries_total{model_name="model",outcome="failed"}') == 1
    before = server.generate("date: 3 May 2024 ->", "live").text
    server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="own", source_path=OTHER))
    file.write_text(json.dumps([{"name": "one", "path": OTHER, "aliases": ["later"]}]))
    assert eventually(lambda: _states(server) == {"one": "READY", "own": "READY"}, 15)
    assert eventually(lambda: _aliases(server) == ["later"])
    assert server.generate("date: 3 May 2024 ->", "later").text != before
    assert not server.adapters.GetAdapter(pb.GetAdapterRequest(name="one")).adapter.pinned


def test_a_manifest_that_cannot_be_read_changes_nothing(followed: tuple[LiveServer, Path]) -> None:
    server, file = followed
    file.write_text("[{")
    failed = 'graft_manifest_entries_total{model_name="model",outcome="failed"}'
    assert eventually(lambda: server.metric(failed) >= 2, 15)
    assert _states(server) == {"one": "READY", "two": "REGISTERED"}


def test_entries_are_read_one_by_one() -> None:
    text = """
    - {name: a, path: x, digest: 'sha256:1', pinned: true, aliases: [b]}
    - {name: a, path: y}
    - {name: 'a/b', path: y}
    - {name: c, path: y, rank: 3}
    - {name: d}
    - e
    - {name: f, path: z}
    """
    entries, problems = parse_manifest(text)
    assert entries == [Entry("a", "x", "sha256:1", True, ("b",)), Entry("f", "z")]
    assert [problem.split(":")[0] for problem in problems] == [f"entry {index}" for index in range(1, 6)]
    for whole in ("{", "name: a", "3"):
        with pytest.raises(ManifestError):
            parse_manifest(whole)
