"""Servers that are broken on purpose, one defect each: the same storm and the same checker tell every one of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.history.broken import DEFECTS
from tests.history.checker import check
from tests.history.plan import Plan
from tests.history.storm import run_storm, storm_server

# What the checker has to say of each, among other things.
TOLD_AS = {
    "page_left_out": "tokens",
    "page_of_the_one_before": "tokens",
    "pages_by_name": "tokens",
    "replaced_but_served_on": "time",
    "promoted_too_early": "tokens",
    "told_by_another_name": "tokens",
}
PLAN = Plan(seed=3, num_requests=200)


def test_each_defect_is_tried() -> None:
    assert TOLD_AS.keys() == DEFECTS.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base is written once."""
    return tmp_path_factory.mktemp("broken")


def _cases() -> list[object]:
    """One of each kind at once, the rest with the whole storm: a server takes seconds to start."""
    later = ("page_left_out", "pages_by_name")
    return [pytest.param(defect, marks=pytest.mark.history if defect in later else ()) for defect in TOLD_AS]


@pytest.mark.parametrize("defect", _cases())
def test_a_broken_build_is_told(folder: Path, tmp_path: Path, defect: str) -> None:
    with storm_server(folder, defect, root=tmp_path) as server:
        history, _ = asyncio.run(run_storm(server, tmp_path, PLAN))
    kinds = [violation.kind for violation in check(history)]
    assert kinds.count(TOLD_AS[defect]) >= 3, kinds
