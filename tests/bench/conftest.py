"""A server whose truth is known: a step takes 10 ms, and every running request gets one token in each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from tests.server.live import LiveServer

STEP_SECONDS = 0.01


@pytest.fixture(scope="session")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The adapters `a` and `b` are loaded."""
    root = tmp_path_factory.mktemp("adapters")
    with LiveServer.fake(root, step_seconds=STEP_SECONDS) as live:
        for name in ("a", "b"):
            (root / name).mkdir()
            live.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id=name, source_path=name))
        yield live
