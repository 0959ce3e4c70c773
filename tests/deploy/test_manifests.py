"""The manifests, as kustomize builds them: against Kubernetes' schemas, the command line and the server's own ports."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from runtime.commands.serve import build_config
from runtime.server.health import GENERATION_SERVICE
from runtime.version import version
from tests.deploy.dockerfile import arguments, read_dockerfile
from tests.deploy.kustomize import kustomization, read_manifests
from tests.deploy.manifests import FOLDERS, KUBERNETES, container_of, manifests_of, options_of, pod_of, settings_of
from tests.deploy.programs import DEPLOY, own_variables

FILES = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
# The first release in which gRPC probes are stable, and the newest whose schemas are at hand.
VERSIONS = ("1.27", "1.37")
# Closing the ports and ending the engine, after the drain (docs/architecture.md).
STOP_SECONDS = 15

both = pytest.mark.parametrize("name", FOLDERS)


def _probes(name: str) -> dict[str, Any]:
    return {kind: container_of(name)[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}


@both
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_schemas_accept_every_manifest(name: str, version: str) -> None:
    assert len(manifests_of(name)) == 6
    for manifest in manifests_of(name).values():
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(KUBERNETES).as_posix())
def test_every_file_of_the_base_is_valid_by_itself_and_every_file_belongs_to_a_kustomization(path: Path) -> None:
    settings = kustomization(path.parent)
    patches = [patch["path"] for patch in settings.get("patches", [])]
    assert path.name in [*settings["resources"], *patches]
    for manifest in read_manifests(path) if path.name not in patches else ():
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_the_schemas_refuse_a_field_that_does_not_exist() -> None:
    manifest = {**manifests_of("base")["Service/graft"], "spec": {"port": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


@both
def test_the_server_accepts_the_arguments_and_their_values(name: str, tmp_path: Path) -> None:
    options = options_of(name)
    options.model = options.adapters_root = tmp_path
    config = build_config(options)
    assert config.adapters_root == tmp_path
    assert config.host == "0.0.0.0", "on loopback neither probes nor clients reach the pod"
    assert config.admin_host == "127.0.0.1"


@both
def test_each_setting_is_named_after_its_flag_and_used(name: str) -> None:
    passed = dict(re.findall(r"^--([a-z-]+)=\$\((\w+)\)$", "\n".join(container_of(name)["args"]), re.MULTILINE))
    assert {flag: flag.upper().replace("-", "_") for flag in passed} == passed
    positional = {"MODEL"}
    assert set(settings_of(name)) - own_variables() == set(passed.values()) | positional


@both
def test_variables_that_are_not_the_servers_own_stand_below_a_comment_that_says_why(name: str) -> None:
    lines = (FOLDERS[name] / "deployment.yaml").read_text(encoding="utf-8").splitlines()
    variables = [(above, line) for above, line in itertools.pairwise(lines) if re.match(r"\s+- name: [A-Z_]+$", line)]
    assert variables
    assert [line for above, line in variables if not above.lstrip().startswith("# ")] == []


@both
def test_ports_are_those_of_the_server(name: str) -> None:
    options = options_of(name)
    ports = {port["name"]: port["containerPort"] for port in container_of(name)["ports"]}
    assert ports == {"grpc": options.grpc_port, "http": options.http_port}
    service = manifests_of(name)["Service/graft"]["spec"]["ports"]
    targets = {port["name"]: (port["port"], port["targetPort"]) for port in service}
    assert targets == {"grpc": (options.grpc_port, "grpc"), "http": (options.http_port, "http")}
    rules = manifests_of(name)["NetworkPolicy/graft"]["spec"]["ingress"]
    assert [port["port"] for rule in rules for port in rule["ports"]] == ["grpc", "http"]
    annotations = manifests_of(name)["Deployment/graft"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(options.http_port)


@both
def test_probes_ask_the_port_and_the_service_names_that_serve_health(name: str) -> None:
    ports = {probe["grpc"]["port"] for probe in _probes(name).values()}
    services = {kind: probe["grpc"].get("service", "") for kind, probe in _probes(name).items()}
    assert ports == {options_of(name).grpc_port}
    ready = GENERATION_SERVICE
    assert services == {"startupProbe": ready, "readinessProbe": ready, "livenessProbe": ""}


@both
def test_a_pod_is_killed_no_sooner_than_its_drain_ends(name: str) -> None:
    options, grace = options_of(name), pod_of(name)["terminationGracePeriodSeconds"]
    assert grace >= options.drain_timeout + STOP_SECONDS
    assert options.drain_delay < options.drain_timeout
    readiness = _probes(name)["readinessProbe"]
    assert options.drain_delay >= readiness["periodSeconds"] * readiness["failureThreshold"]


@both
def test_a_rollout_waits_longer_than_a_start_may_take(name: str) -> None:
    startup = _probes(name)["startupProbe"]
    longest = startup["periodSeconds"] * startup["failureThreshold"]
    assert manifests_of(name)["Deployment/graft"]["spec"]["progressDeadlineSeconds"] > longest


@both
def test_the_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    pod, server = pod_of(name), container_of(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    assert server["securityContext"]["allowPrivilegeEscalation"] is False
    assert server["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not server["securityContext"].get("privileged")


@both
def test_only_scratch_space_is_writable_and_every_mount_has_its_volume(name: str) -> None:
    volumes = {volume["name"]: volume for volume in pod_of(name)["volumes"]}
    mounts = container_of(name)["volumeMounts"]
    assert {mount["name"] for mount in mounts} == set(volumes)
    writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    assert writable == {"/tmp", "/home/graft", "/dev/shm"}
    claims = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
    assert len(claims) == 2
    assert {f"PersistentVolumeClaim/{claim['claimName']}" for claim in claims} <= set(manifests_of(name))
    assert Path(settings_of(name)["MODEL"]).parent == Path("/models")
    assert options_of(name).adapters_root == Path("/adapters")


@both
def test_images_are_those_of_the_dockerfiles_with_a_fixed_tag(name: str) -> None:
    image, _, tag = container_of(name)["image"].rpartition(":")
    assert image.split("/")[-1] == "graft"
    assert re.fullmatch(rf"(cpu|ascend-a[23])-{re.escape(version())}", tag)


@both
def test_no_other_pod_takes_part_in_the_service(name: str) -> None:
    manifests = manifests_of(name)
    deployment = manifests["Deployment/graft"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert manifests["Service/graft"]["spec"]["selector"] == labels
    assert manifests["NetworkPolicy/graft"]["spec"]["podSelector"]["matchLabels"] == labels


def test_the_ascend_overlay_asks_for_a_device_and_mounts_the_driver_read_only() -> None:
    resources = container_of("ascend")["resources"]
    devices = {kind: resources[kind]["huawei.com/Ascend910"] for kind in ("requests", "limits")}
    assert devices["requests"] == devices["limits"], "an extended resource cannot be overcommitted"
    assert options_of("ascend").device == "npu"
    volumes = pod_of("ascend")["volumes"]
    host = {volume["name"]: volume["hostPath"]["path"] for volume in volumes if "hostPath" in volume}
    mounts = {mount["name"]: mount for mount in container_of("ascend")["volumeMounts"]}
    assert {mounts[volume]["mountPath"] for volume in host} == set(host.values())
    assert all(mounts[volume]["readOnly"] for volume in host)
    assert {f"/usr/local/{path}" for path in ("Ascend/driver/lib64", "Ascend/driver/version.info", "dcmi")} <= {
        *host.values()
    }


def test_the_user_is_in_the_group_of_the_device_nodes_in_the_image_and_in_the_pod() -> None:
    group = arguments(read_dockerfile(DEPLOY / "docker" / "ascend.Dockerfile"))["ASCEND_GID"]
    assert pod_of("ascend")["securityContext"]["supplementalGroups"] == [int(group)]
