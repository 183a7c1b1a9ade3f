"""What stands in deploy/ and docker-compose.yml fits the service and itself."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.metrics import Metrics
from service.settings import Settings
from tests.support.server import ROOT

KUBERNETES_VERSION = "1.33"
CLUSTER_DNS_CACHE_S = 30  # of CoreDNS, as it is usually set
MANIFESTS = [*sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")), ROOT / "deploy" / "envoy" / "kubernetes.yaml"]
ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def manifest(kind: str, name: str) -> dict[str, Any]:
    found = [d for file in MANIFESTS for d in documents(file) if d["kind"] == kind and d["metadata"]["name"] == name]
    assert len(found) == 1, (kind, name)
    return found[0]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("Deployment", "rnnserve")["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    described: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return described


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_manifest_is_what_kubernetes_accepts(file: Path) -> None:
    for document in documents(file):
        if document["kind"] != "Kustomization":
            kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def test_the_kustomizations_name_all_manifests() -> None:
    named = {
        (file.parent / name).resolve()
        for file in [*MANIFESTS, ROOT / "deploy" / "envoy" / "kustomization.yaml"]
        if file.name == "kustomization.yaml"
        for name in documents(file)[0]["resources"]
    }
    assert named == {*MANIFESTS, ROOT / "deploy" / "envoy"} - {ROOT / "deploy" / "kubernetes" / "kustomization.yaml"}


def test_the_settings_of_pods_and_containers_exist(pod: dict[str, Any], compose: dict[str, Any]) -> None:
    given = [*environment(pod["containers"][0]), *compose["services"]["service"]["environment"]]
    assert {name.removeprefix("RNNSERVE_").lower() for name in given} <= set(Settings.model_fields)


def test_every_folder_of_the_image_is_on_a_disk(pod: dict[str, Any], compose: dict[str, Any]) -> None:
    folders = dict(re.findall(r"RNNSERVE_(\w+_DIR)=(\S+)", (ROOT / "Dockerfile").read_text()))
    assert set(folders) == {"STATE_DIR", "SPILL_DIR"}
    disks = {volume["name"] for volume in pod["volumes"] if volume["emptyDir"].get("medium") != "Memory"}
    (container,) = pod["containers"]
    assert {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in disks} == {*folders.values()}
    volumes = dict(volume.split(":") for volume in compose["services"]["rnnserve"]["volumes"])
    assert set(volumes) <= set(compose["volumes"])
    assert set(volumes.values()) == {*folders.values()}


def test_a_pod_has_the_time_for_its_drain(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    before_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = float(environment(container)["RNNSERVE_DRAIN_TIMEOUT_S"])
    assert before_s + drain_s < pod["terminationGracePeriodSeconds"]


def test_a_rollout_waits_until_envoy_can_know_the_new_pod() -> None:
    assert manifest("Deployment", "rnnserve")["spec"]["minReadySeconds"] > CLUSTER_DNS_CACHE_S


def test_an_apply_leaves_the_number_of_pods_to_the_scaler() -> None:
    assert "replicas" not in manifest("Deployment", "rnnserve")["spec"]


def test_a_pod_that_is_to_go_is_no_longer_named_and_envoy_heeds_that() -> None:
    assert not manifest("Service", "rnnserve-services")["spec"].get("publishNotReadyAddresses")
    (cluster,) = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())["static_resources"]["clusters"]
    assert cluster["ignore_health_on_host_removal"] is True


@pytest.mark.parametrize("name", ["rnnserve", "rnnserve-envoy"])
def test_pods_of_a_deployment_are_neither_evicted_nor_lost_all_at_once(name: str) -> None:
    selector = {"matchLabels": {"app": name}}
    assert manifest("PodDisruptionBudget", name)["spec"] == {"maxUnavailable": 1, "selector": selector}
    template = manifest("Deployment", name)["spec"]["template"]
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"] == selector
    assert template["metadata"]["labels"] == selector["matchLabels"]


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_no_container_may_more_than_it_must(kind: str) -> None:
    found = [d for file in MANIFESTS for d in documents(file) if d["kind"] == kind]
    assert found
    for spec in (document["spec"]["template"]["spec"] for document in found):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_envoy_says_where_it_is_asked_whether_it_serves(compose: dict[str, Any]) -> None:
    (listener,) = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())["static_resources"]["listeners"]
    check, _ = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (header,) = check["typed_config"]["headers"]
    path = header["string_match"]["exact"]
    (container,) = manifest("Deployment", "rnnserve-envoy")["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == path
    assert f"GET {path} " in compose["services"]["envoy"]["healthcheck"]["test"][-1]


def test_kubernetes_sets_no_variables_that_the_service_would_refuse(pod: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False


def test_the_scaler_follows_a_metric_that_exists() -> None:
    (metric,) = manifest("HorizontalPodAutoscaler", "rnnserve")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {family.name for family in Metrics().registry.collect()}


def test_every_redis_keeps_what_it_was_given(compose: dict[str, Any]) -> None:
    (container,) = manifest("StatefulSet", "rnnserve-redis")["spec"]["template"]["spec"]["containers"]
    for command in (" ".join(container["args"]), compose["services"]["redis"]["command"]):
        for words in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"):
            assert words in command


def test_envoy_finds_the_services_under_the_name_that_they_have(compose: dict[str, Any]) -> None:
    (cluster,) = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    name = endpoint["endpoint"]["address"]["socket_address"]["address"]
    assert manifest("Service", name)["spec"]["clusterIP"] == "None"
    assert name in compose["services"]["service"]["networks"]["default"]["aliases"]


@pytest.mark.skipif(ENVOY is None, reason="no envoy runs here")
def test_envoy_accepts_its_configuration() -> None:
    command = [str(ENVOY), "--mode", "validate", "--config-path", str(ROOT / "deploy/envoy/envoy.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
