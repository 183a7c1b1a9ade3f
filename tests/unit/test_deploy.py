"""What stands in deploy/ and docker-compose.yml fits the service and itself."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.metrics import Metrics
from service.sessions.snapshots import SnapshotKeys
from service.settings import Settings
from service.supervisor import LAST_WORDS_S
from tests.support.server import ROOT

KUBERNETES_VERSION = "1.33"
CLUSTER_DNS_CACHE_S = 30  # of CoreDNS, as it is usually set
MANIFESTS = [*sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")), ROOT / "deploy" / "envoy" / "kubernetes.yaml"]
OURS = ("rnnserve", "service")  # of compose
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))
SECRETS = ("redis_password", "redis_url", "snapshot_keys")
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
    given = [environment(pod["containers"][0]), *(compose["services"][name]["environment"] for name in OURS)]
    ours = {name for variables in given for name in variables if name.startswith("RNNSERVE_")}
    assert "RNNSERVE_REDIS_URL_FILE" in ours
    assert {name.removeprefix("RNNSERVE_").lower() for name in ours} <= set(Settings.model_fields)


def test_every_folder_of_the_image_is_on_a_disk(pod: dict[str, Any], compose: dict[str, Any]) -> None:
    folders = dict(re.findall(r"RNNSERVE_(\w+_DIR)=(\S+)", (ROOT / "Dockerfile").read_text()))
    assert set(folders) == {"STATE_DIR", "SPILL_DIR"}
    disks = {volume["name"] for volume in pod["volumes"] if volume.get("emptyDir") == {}}
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


@pytest.mark.parametrize("name", OURS)
def test_a_container_has_the_time_for_its_drain(compose: dict[str, Any], name: str) -> None:
    grace_s = float(compose["services"][name]["stop_grace_period"].removesuffix("s"))
    workers_s = Settings.model_fields["drain_timeout_s"].default + LAST_WORDS_S
    lane_s = LAST_WORDS_S
    assert "RNNSERVE_DRAIN_TIMEOUT_S" not in compose["services"][name]["environment"]
    assert workers_s + lane_s < grace_s


@pytest.mark.parametrize("name", ["rnnserve", "service", "envoy", "redis", "prometheus", "grafana"])
def test_no_container_of_compose_may_more_than_it_must(compose: dict[str, Any], name: str) -> None:
    container = compose["services"][name]
    assert (container["read_only"], container["cap_drop"]) == (True, ["ALL"])
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(container)
    assert set(container["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert container["restart"] == "unless-stopped"
    assert container["logging"]["driver"] == "json-file"
    assert set(container["logging"]["options"]) == {"max-size", "max-file"}
    assert all(port.startswith("127.0.0.1:") for port in container.get("ports", ()))


def test_all_of_compose_have_a_health_check_and_wait_for_it_in_others(compose: dict[str, Any]) -> None:
    others = {name for name in compose["services"] if name not in OURS}
    assert all("healthcheck" in compose["services"][name] for name in others)
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()  # that of ours
    needed = {name: set(container.get("depends_on", ())) for name, container in compose["services"].items()}
    assert {name: to for name, to in needed.items() if to} == {
        "service": {"redis"}, "envoy": {"service"}, "grafana": {"prometheus"},
    }  # fmt: skip
    for container in compose["services"].values():
        for condition in container.get("depends_on", {}).values():
            assert condition == {"condition": "service_healthy"}


def test_the_service_runs_as_the_user_whose_folders_are_there(pod: dict[str, Any]) -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users == [(str(pod["securityContext"]["runAsUser"]), str(pod["securityContext"]["fsGroup"]))]


def test_the_image_has_the_version_of_the_project(compose: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text()
    assert {compose["services"][name]["image"] for name in OURS} == {f"rnnserve:{version}"}


def test_secrets_come_as_files_that_a_command_makes(compose: dict[str, Any], tmp_path: Path) -> None:
    make = ["sh", str(ROOT / "deploy/make-secrets.sh"), str(tmp_path / "secrets")]
    subprocess.run(make, check=True)
    made = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(compose["secrets"]) == set(SECRETS)
    assert made["redis_url"].strip() == f"redis://:{made['redis_password']}@redis:6379/0"
    assert SnapshotKeys.parse(made["snapshot_keys"]).signing_id == "first"
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    subprocess.run(make, check=True)
    assert {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()} == made


def test_who_reads_a_secret_is_given_it_and_no_variable_has_one(compose: dict[str, Any]) -> None:
    snapshots = yaml.safe_load((ROOT / "deploy/compose-snapshots.yml").read_text())["services"]
    for name, container in [*compose["services"].items(), *snapshots.items()]:
        read = set(re.findall(r"/run/secrets/(\w+)", yaml.safe_dump(container)))
        assert read == set(container.get("secrets", ())), name
        variables = container.get("environment", {})
        assert not [v for v in variables if re.search(r"PASSWORD|URL|KEY|TOKEN", v) and not v.endswith("_FILE")]


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint runs here")
def test_the_dockerfile_has_no_known_mistake() -> None:
    done = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


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
    for command in (" ".join(container["args"]), compose["services"]["redis"]["command"][-1]):
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
