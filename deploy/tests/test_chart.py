"""The chart renders strictly valid objects, and refuses what cannot work."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = yaml.safe_load((ROOT / "helm/tessera/ci/minimal-values.yaml").read_text())


@pytest.fixture(scope="module")
def chart() -> ModuleType:
    specification = importlib.util.spec_from_file_location("chart", ROOT / "deploy/tools/chart.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _deployment(objects: list[dict[str, Any]], service: str) -> dict[str, Any]:
    return next(item for item in objects if item["kind"] == "Deployment" and item["metadata"]["name"].endswith(service))


def test_every_values_file_renders_valid_objects(chart: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert chart.main() == 0, capsys.readouterr().err


def test_a_field_that_kubernetes_does_not_know_is_found(chart: ModuleType) -> None:
    objects = chart.rendered(MINIMAL)
    _deployment(objects, "memory")["spec"]["replicaz"] = 2
    assert any("replicaz" in problem for problem in chart.problems(objects))


def test_a_missing_service_is_found(chart: ModuleType) -> None:
    objects = [item for item in chart.rendered(MINIMAL) if not item["metadata"]["name"].endswith("memory")]
    assert any("six services" in problem for problem in chart.problems(objects))


@pytest.mark.parametrize("name", ["kafka", "postgres", "redis", "objects", "existingSecret"])
def test_what_the_chart_does_not_bundle_is_required(chart: ModuleType, name: str) -> None:
    with pytest.raises(Exception, match="is required"):
        chart.rendered({key: value for key, value in MINIMAL.items() if key != name})


@pytest.mark.parametrize(
    "change",
    [{"kafka": {"bootstrapServer": "k:9092"}}, {"profile": "staging"}, {"services": {"memory": {"replicas": -1}}}, {"drainSeconds": 60}],
)
def test_values_that_cannot_work_are_refused(chart: ModuleType, change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"schema|additional|must exceed|minimum|one of"):
        chart.rendered({**MINIMAL, **change})


def test_every_pod_is_restricted(chart: ModuleType) -> None:
    objects = chart.rendered(MINIMAL)
    pods = [item["spec"]["template"]["spec"] for item in objects if item["kind"] in {"Deployment", "Job"}]
    containers = [container for pod in pods for container in (*pod.get("initContainers", []), *pod["containers"])]
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)
    assert all(container["securityContext"]["readOnlyRootFilesystem"] for container in containers)
    assert all(container["securityContext"]["capabilities"] == {"drop": ["ALL"]} for container in containers)


def test_no_secret_is_written_into_an_object(chart: ModuleType) -> None:
    objects = chart.rendered(MINIMAL)
    assert not [item for item in objects if item["kind"] == "Secret"]
    memory = _deployment(objects, "memory")["spec"]["template"]["spec"]["containers"][0]
    passwords = [variable for variable in memory["env"] if variable["name"].endswith("PASSWORD")]
    assert passwords
    assert all("valueFrom" in variable for variable in passwords)


def test_the_spool_is_on_where_there_is_a_claim_and_nowhere_else(chart: ModuleType) -> None:
    with_claim = chart.rendered({**MINIMAL, "spool": {"existingClaim": "spool", "maximumBytes": 2**30}})
    for objects, service, expected in (
        (with_claim, "gateway", True),
        (with_claim, "memory", False),
        (chart.rendered(MINIMAL), "gateway", False),
    ):
        pod = _deployment(objects, service)["spec"]["template"]["spec"]
        variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert (variables.get("TESSERA_GATEWAY__SPOOL__FOLDER") == mounted.get("spool", "")) is expected
        assert (variables.get("TESSERA_GATEWAY__SPOOL__MAXIMUM_BYTES") == "1073741824") is expected
        assert any(volume["name"] == "spool" for volume in pod["volumes"]) is expected
