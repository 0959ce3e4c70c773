"""One server for the tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import LiveServer


@pytest.fixture(scope="session")
def adapters_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three adapter folders, a link that leads out, and a folder with a link inside."""
    root = tmp_path_factory.mktemp("adapters")
    outside = tmp_path_factory.mktemp("outside")
    for name in ("dates", "other", "broken", "crash", "team/nested", "linked_file"):
        (root / name).mkdir(parents=True)
    (outside / "secret").write_text("x")
    (root / "leads_out").symlink_to(outside)
    (root / "linked_file" / "adapter_config.json").symlink_to(outside / "secret")
    (root / "a_file").write_text("x")
    return root


@pytest.fixture(scope="session")
def server(adapters_root: Path) -> Iterator[LiveServer]:
    """Shared; the adapter `dates` is loaded."""
    with LiveServer.fake(adapters_root, "max_waiting_requests=64") as live:
        from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb

        live.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id="dates", source_path="dates"))
        yield live
