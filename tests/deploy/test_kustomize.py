"""The merge that the other tests read manifests through, against what kustomize itself wrote for an example."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.kustomize import Manifest, build, merge, read_manifests

EXAMPLE = Path(__file__).parent / "kustomize_example"


def _by_identity(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


@pytest.mark.parametrize("folder", ["base", "overlay"])
def test_a_build_is_what_kustomize_makes_of_it(folder: str) -> None:
    expected = list(read_manifests(EXAMPLE / f"{folder}.expected.yaml"))
    assert _by_identity(build(EXAMPLE / folder)) == _by_identity(expected)


@pytest.mark.parametrize(
    ("base", "patch", "name"),
    [
        ({"a": 1}, {"a": None}, ""),
        ({"a": 1}, {"$patch": "delete"}, ""),
        ([{"x": 1}], [{"x": 2}], "unheardOf"),
        ({"a": 1}, [1], ""),
    ],
)
def test_what_the_merge_does_not_know_is_an_error(base: object, patch: object, name: str) -> None:
    with pytest.raises(ValueError, match=r"not known here|do not go together"):
        merge(base, patch, name)


def test_an_unknown_field_of_a_kustomization_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\nnamePrefix: a-\n", encoding="utf-8")
    with pytest.raises(ValueError, match="namePrefix"):
        build(tmp_path)


def test_a_patch_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("patches: [{path: patch.yaml}]\n", encoding="utf-8")
    (tmp_path / "patch.yaml").write_text("{apiVersion: v1, kind: Service, metadata: {name: x}}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="fits 0 manifests"):
        build(tmp_path)
