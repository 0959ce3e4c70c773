"""The part of `kustomize build` that deploy/kubernetes uses, for machines without the program; all else is an error.

`test_kustomize.py` compares it with what kustomize itself made of an example.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
FIELDS = {"apiVersion", "kind", "resources", "images", "configMapGenerator", "patches"}
# By what a strategic merge tells the elements of a list apart; lists of other names are replaced as a whole.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}
# A list of objects under one of these names is replaced by kustomize too.
REPLACED_LISTS = {"envFrom", "tolerations"}
# What Go's JSON writes in its long form.
GO_ESCAPES = str.maketrans({letter: f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"})
HASH_LETTERS = str.maketrans("013ae", "ghkmt")


def build(folder: Path) -> list[Manifest]:
    """The full manifests of a folder with a kustomization.yaml; raises ValueError for what is not known here."""
    manifests, config_maps = _collect(folder)
    names = {name: f"{name}-{_hash(data)}" for name, data in config_maps.items()}
    generated = [_config_map(names[name], data) for name, data in config_maps.items()]
    return [*generated, *(_refer(manifest, names) for manifest in manifests)]


def kustomization(folder: Path) -> Manifest:
    """The kustomization.yaml of a folder; raises ValueError for a field that is not known here."""
    settings = next(read_manifests(folder / "kustomization.yaml"))
    _require_known(settings, FIELDS, folder / "kustomization.yaml")
    return settings


def read_manifests(path: Path) -> Any:
    """Yields the documents of a file."""
    yield from (document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document)


def _collect(folder: Path) -> tuple[list[Manifest], dict[str, dict[str, str]]]:
    """Manifests and the data of generated ConfigMaps, before names get their hashes."""
    settings = kustomization(folder)
    manifests: list[Manifest] = []
    config_maps: dict[str, dict[str, str]] = {}
    for resource in settings.get("resources", []):
        path = folder / resource
        if path.is_dir():
            inner, inner_maps = _collect(path.resolve())
            manifests += inner
            config_maps |= inner_maps
        else:
            manifests += read_manifests(path)
    for generator in settings.get("configMapGenerator", []):
        _generate(folder, generator, config_maps)
    for patch in settings.get("patches", []):
        _require_known(patch, {"path"}, folder)
        for document in read_manifests(folder / patch["path"]):
            _patch(manifests, document)
    for image in settings.get("images", []):
        _require_known(image, {"name", "newName", "newTag"}, folder)
        for manifest in manifests:
            _set_image(manifest, image)
    return manifests, config_maps


def _generate(folder: Path, generator: Manifest, config_maps: dict[str, dict[str, str]]) -> None:
    _require_known(generator, {"name", "behavior", "envs"}, folder)
    name, behavior = generator["name"], generator.get("behavior", "create")
    if (behavior, name in config_maps) not in (("create", False), ("merge", True)):
        raise ValueError(f"{folder}: ConfigMap {name}: behavior {behavior} does not fit what the resources have")
    data = config_maps.setdefault(name, {})
    for file in generator["envs"]:
        for line in (folder / file).read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                key, separator, value = line.partition("=")
                if not separator:
                    raise ValueError(f"{folder / file}: {line!r} is not NAME=VALUE")
                data[key] = value


def _config_map(name: str, data: dict[str, str]) -> Manifest:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def _hash(data: dict[str, str]) -> str:
    """The ending of a generated name: ten digits of a SHA-256, some of them replaced so that no word comes out."""
    content = {"data": data, "kind": "ConfigMap", "name": ""}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.translate(GO_ESCAPES).encode()).hexdigest()[:10].translate(HASH_LETTERS)


def _identity(manifest: Manifest) -> tuple[str, str, str]:
    return manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]


def _patch(manifests: list[Manifest], patch: Manifest) -> None:
    matches = [index for index, manifest in enumerate(manifests) if _identity(manifest) == _identity(patch)]
    if len(matches) != 1:
        raise ValueError(f"the patch of {_identity(patch)} fits {len(matches)} manifests")
    manifests[matches[0]] = merge(manifests[matches[0]], patch)


def merge(base: Any, patch: Any, name: str = "") -> Any:
    """A strategic merge: mappings by key, lists of `MERGE_KEYS` by element, new ones first, others whole."""
    if isinstance(base, dict) and isinstance(patch, dict):
        if any(key.startswith("$") for key in patch) or None in patch.values():
            raise ValueError(f"{name}: directives and null are not known here")
        merged = copy.deepcopy(base)
        for key, value in patch.items():
            merged[key] = merge(base[key], value, key) if key in base else copy.deepcopy(value)
        return merged
    if isinstance(base, list) and isinstance(patch, list) and name in MERGE_KEYS:
        return _merge_list(base, patch, MERGE_KEYS[name])
    if isinstance(patch, list) and name not in REPLACED_LISTS and any(isinstance(item, dict) for item in patch):
        raise ValueError(f"{name}: how this list is merged is not known here")
    if type(base) is not type(patch):
        raise ValueError(f"{name}: {base!r} and {patch!r} do not go together")
    return copy.deepcopy(patch)


def _merge_list(base: list[Manifest], patch: list[Manifest], key: str) -> list[Manifest]:
    old = {element[key]: element for element in base}
    new = [merge(old[element[key]], element) if element[key] in old else element for element in patch]
    patched = {element[key] for element in patch}
    return [*new, *(element for element in base if element[key] not in patched)]


def _containers(manifest: Manifest) -> list[Manifest]:
    pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def _set_image(manifest: Manifest, image: Manifest) -> None:
    for container in _containers(manifest):
        name, _, tag = container["image"].partition(":")
        if name == image["name"]:
            container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"


def _refer(manifest: Manifest, names: dict[str, str]) -> Manifest:
    for container in _containers(manifest):
        for source in container.get("envFrom", []):
            reference = source["configMapRef"]
            reference["name"] = names.get(reference["name"], reference["name"])
    return manifest


def _require_known(settings: Manifest, known: set[str], where: Path) -> None:
    if unknown := set(settings) - known:
        raise ValueError(f"{where}: not known here: {', '.join(sorted(unknown))}")
