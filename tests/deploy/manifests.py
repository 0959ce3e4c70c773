"""The manifests as kustomize builds them, and what of them the tests ask for."""

from __future__ import annotations

import argparse
import re
from functools import cache

from tests.deploy.kustomize import Manifest, build
from tests.deploy.programs import DEPLOY, parse

KUBERNETES = DEPLOY / "kubernetes"
FOLDERS = {"base": KUBERNETES / "base", "ascend": KUBERNETES / "overlays" / "ascend"}


@cache
def manifests_of(name: str) -> dict[str, Manifest]:
    """By kind and name, without the hash that kustomize appends."""
    built = build(FOLDERS[name])
    return {f"{item['kind']}/{re.sub('-settings-.*', '-settings', item['metadata']['name'])}": item for item in built}


def pod_of(name: str) -> Manifest:
    """The Deployment's pod."""
    pod: Manifest = manifests_of(name)["Deployment/graft"]["spec"]["template"]["spec"]
    return pod


def container_of(name: str) -> Manifest:
    """The pod's one container."""
    (server,) = pod_of(name)["containers"]
    return dict(server)


def settings_of(name: str) -> dict[str, str]:
    """The data of the ConfigMap."""
    return dict(manifests_of(name)["ConfigMap/graft-settings"]["data"])


def _arguments(name: str) -> list[str]:
    """The container's arguments, with $(NAME) replaced as the kubelet does."""
    settings = settings_of(name)
    return [re.sub(r"\$\((\w+)\)", lambda found: settings[found[1]], part) for part in container_of(name)["args"]]


def options_of(name: str) -> argparse.Namespace:
    """The options that `graft` makes of the arguments."""
    return parse(_arguments(name))
