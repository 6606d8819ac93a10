"""The chart renders strictly valid objects, and refuses what cannot work."""

import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values

from tessera.local.certificates import Authority
from tessera.memory.settings import MemorySettings

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
    [
        {"kafka": {"bootstrapServer": "k:9092"}},
        {"profile": "staging"},
        {"services": {"memory": {"replicas": -1}}},
        {"services": {"memory": {"replicas": 13}}},
        {"drainSeconds": 60},
        {"drainSeconds": 43},
    ],
)
def test_values_that_cannot_work_are_refused(chart: ModuleType, change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"schema|additional|must exceed|must not exceed|minimum|one of"):
        chart.rendered({**MINIMAL, **change})


def test_the_rebalance_time_out_lies_between_drain_and_grace(chart: ModuleType) -> None:
    objects = chart.rendered(
        {**MINIMAL, "drainSeconds": 100, "terminationGracePeriodSeconds": 104, "services": {"gateway": {"replicas": 20}}}
    )
    told = next(item["data"] for item in objects if item["kind"] == "ConfigMap" and "TESSERA__DRAIN_SECONDS" in item["data"])
    drain, rebalance, grace = (
        float(told[name])
        for name in ("TESSERA__DRAIN_SECONDS", "TESSERA__KAFKA__REBALANCE_TIMEOUT_SECONDS", "TESSERA__TERMINATION_GRACE_SECONDS")
    )
    assert drain < rebalance < grace == 104


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


FULL: dict[str, Any] = yaml.safe_load((ROOT / "helm/tessera/ci/full-values.yaml").read_text())


def test_settings_that_reload_are_a_file_in_every_pod_and_restart_none(chart: ModuleType) -> None:
    before, after = chart.rendered(FULL), chart.rendered({**FULL, "settings": {"TESSERA_GATEWAY__CORS_ORIGINS": "[]"}})
    for service in ("gateway", "memory"):
        assert _deployment(before, service) == _deployment(after, service)
        container = _deployment(before, service)["spec"]["template"]["spec"]["containers"][0]
        variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        folder, _, name = variables["TESSERA_SETTINGS_FILE"].rpartition("/")
        assert folder == mounted["settings"]
        (lines,) = [item["data"][name] for item in before if item["kind"] == "ConfigMap" and name in item["data"]]
        assert dotenv_values(stream=io.StringIO(lines)) == FULL["settings"]


def test_the_gateway_speaks_tls_where_a_secret_is_named(chart: ModuleType) -> None:
    container = _deployment(chart.rendered(FULL), "gateway")["spec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert variables["TESSERA_GATEWAY__TLS__CERTIFICATE_FILE"] == mounted["gateway-tls"] + "/tls.crt"
    assert "gateway-tls" not in str(_deployment(chart.rendered(FULL), "memory"))
    assert "TESSERA_GATEWAY__TLS" not in str(_deployment(chart.rendered(MINIMAL), "gateway"))


SECURED: dict[str, Any] = yaml.safe_load((ROOT / "helm/tessera/ci/secured-values.yaml").read_text())
CERTIFICATES: dict[str, Any] = yaml.safe_load((ROOT / "helm/tessera/ci/certificates-values.yaml").read_text())


def test_each_service_logs_in_as_itself_and_setup_as_an_administrator(chart: ModuleType) -> None:
    objects = chart.rendered(SECURED)
    users = {service: _variables(_deployment(objects, service))["TESSERA__KAFKA__SASL_USERNAME"]["value"] for service in chart.SERVICES}
    assert users == {service: f"tessera-{service}" for service in chart.SERVICES}
    key = _variables(_deployment(objects, "memory"))["TESSERA__KAFKA__SASL_PASSWORD"]["valueFrom"]["secretKeyRef"]["key"]
    assert key == "kafka-memory-password"
    setup = next(item for item in objects if item["kind"] == "Job")["spec"]["template"]["spec"]["initContainers"][-1]
    assert setup["command"][2:4] == ["tessera.bus.make_acls", "--apply"]
    assert {"name": "TESSERA__KAFKA__SASL_USERNAME", "value": "administrator"} in setup["env"]


def test_each_service_gets_its_own_certificate(chart: ModuleType) -> None:
    objects = chart.rendered(CERTIFICATES)
    for service in chart.SERVICES:
        pod = _deployment(objects, service)["spec"]["template"]["spec"]
        shown = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        assert shown == {"kafka-ca": "kafka-ca", "kafka-client": f"kafka-{service}"}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} >= set(shown)


@pytest.mark.parametrize("kafka", [{"ownPrincipals": True}, {"tlsCaSecret": "ca"}, {"securityProtocol": "SSL", "ownPrincipals": True}])
def test_security_without_effect_is_refused(chart: ModuleType, kafka: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="need"):
        chart.rendered({**MINIMAL, "kafka": {**MINIMAL["kafka"], **kafka}})


@pytest.mark.parametrize("values", [MINIMAL, SECURED, CERTIFICATES])
def test_every_variable_is_a_setting(chart: ModuleType, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The settings forbid what they do not know. Files are those of the chart's mounts; here an authority's certificate stands for them."""
    authority = Authority(tmp_path)
    authority.create()
    files = {"ca.crt": authority.ca_file, "tls.crt": authority.issue("own").certificate_file, "tls.key": tmp_path / "own.key"}
    objects = chart.rendered(values)
    given = next(item["data"] for item in objects if item["kind"] == "ConfigMap")
    given |= {name: entry.get("value", "secret") for name, entry in _variables(_deployment(objects, "memory")).items()}
    for name, value in given.items():
        monkeypatch.setenv(name, str(files[value.rpartition("/")[2]]) if value.startswith("/etc/tessera/") else value)
    settings = MemorySettings()
    assert settings.kafka.security_protocol == values["kafka"].get("securityProtocol", "PLAINTEXT")


def _variables(deployment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
