"""Adapter paths: nothing outside the root is ever reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import InvalidRequest, NotFound, Precondition
from runtime.server.paths import display_path, resolve_source_path


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "/etc",
        "..",
        "../x",
        "dates/../../x",
        "dates/..",
        "leads_out",
        "leads_out/secret",
        "linked_file",
        "a_file",
        "a\0b",
    ],
)
def test_a_path_that_leaves_the_root_is_refused(adapters_root: Path, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_source_path(adapters_root, path)
    assert (caught.value.field, caught.value.reason) == ("source_path", "PATH_NOT_ALLOWED")


@pytest.mark.parametrize("path", ["dates", "team/nested", "./dates"])
def test_a_folder_below_the_root_is_found(adapters_root: Path, path: str) -> None:
    found = resolve_source_path(adapters_root, path)
    assert found == (adapters_root / path).resolve()
    assert display_path(adapters_root, str(found)) == path.removeprefix("./")


@pytest.mark.parametrize("path", ["nothing", "dates/nothing", "x" * 5000])
def test_a_folder_that_is_not_there_is_not_found(adapters_root: Path, path: str) -> None:
    with pytest.raises(NotFound):
        resolve_source_path(adapters_root, path)


def test_a_root_that_is_itself_a_link_works(adapters_root: Path, tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to(adapters_root)
    assert resolve_source_path(tmp_path / "root", "dates") == adapters_root.resolve() / "dates"


def test_without_a_root_nothing_is_loaded_by_path() -> None:
    with pytest.raises(Precondition):
        resolve_source_path(None, "dates")
