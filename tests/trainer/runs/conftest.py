"""Fixtures of the tests that run the real command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.runs.demo import Graft, graft_in, write_rows


@pytest.fixture
def graft(capfd: pytest.CaptureFixture[str]) -> Graft:
    return graft_in(capfd)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
