"""Settings from the environment, the common variables and files."""

import ssl
from pathlib import Path

import pytest
from pydantic import ValidationError

from tessera.bus import faults
from tessera.bus.reloading import explained
from tessera.bus.service import run_service
from tessera.bus.settings import KafkaSettings, KafkaTls, ServiceSettings


class MemorySettings(ServiceSettings, service="memory"):
    """As a service has them."""

    limit: int = 3


@pytest.fixture(autouse=True)
def passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA__POSTGRES__WORKER_PASSWORD", "w")
    monkeypatch.setenv("TESSERA__POSTGRES__CLIENT_PASSWORD", "c")


def test_the_services_own_variable_goes_before_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA__KAFKA__BOOTSTRAP_SERVERS", "common:1")
    monkeypatch.setenv("TESSERA__KAFKA__TOPIC_PREFIX", "p.")
    monkeypatch.setenv("TESSERA_MEMORY__KAFKA__BOOTSTRAP_SERVERS", "own:1")
    monkeypatch.setenv("TESSERA_MEMORY__LIMIT", "7")
    settings = MemorySettings()
    assert (settings.kafka.bootstrap_servers, settings.kafka.topic_prefix, settings.limit) == ("own:1", "p.", 7)


def test_secrets_come_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TESSERA__POSTGRES__WORKER_PASSWORD")
    (tmp_path / "TESSERA__POSTGRES__WORKER_PASSWORD").write_text("from a file")
    monkeypatch.setenv("TESSERA_SECRETS", str(tmp_path))
    assert MemorySettings().postgres.worker_password.get_secret_value() == "from a file"


def test_everything_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_MEMORY__LIMIT", "many")
    monkeypatch.setenv("TESSERA_MEMORY__KAFKA__WINDOW", "0")
    monkeypatch.setenv("TESSERA_MEMORY__POSTGRES__PORT", "secret-looking")
    with pytest.raises(ValidationError) as wrong:
        MemorySettings()
    said = explained(MemorySettings, wrong.value)
    assert "3 settings are wrong" in said
    for name in ("TESSERA_MEMORY__LIMIT", "TESSERA_MEMORY__KAFKA__WINDOW", "TESSERA_MEMORY__POSTGRES__PORT"):
        assert name in said
    assert "secret-looking" not in said


def test_wrong_settings_end_the_process_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TESSERA_MEMORY__ADMIN_PORT", "-1")
    with pytest.raises(SystemExit) as ended:
        run_service(MemorySettings, lambda runtime: None)  # type: ignore[arg-type, return-value]
    assert ended.value.code == 2
    assert "TESSERA_MEMORY__ADMIN_PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TESSERA_MEMORY__CRASH_POINT", "consumed_before_commit", "only for the profile test"),
        ("TESSERA_MEMORY__DRAIN_SECONDS", "60", "must be below kafka.rebalance_timeout_seconds"),
        ("TESSERA_MEMORY__KAFKA__REBALANCE_TIMEOUT_SECONDS", "45", "must be below termination_grace_seconds"),
        ("TESSERA_MEMORY__TERMINATION_GRACE_SECONDS", "30", "must be below termination_grace_seconds"),
        ("TESSERA_MEMORY__KAFKA__SECURITY_PROTOCOL", "SASL_SSL", "sasl_username and sasl_password are needed"),
        ("TESSERA_MEMORY__KAFKA__SASL_USERNAME", "u", "have no effect with PLAINTEXT"),
        ("TESSERA_MEMORY__KAFKA__TLS__KEY_PASSWORD", "p", "belong to a certificate_file"),
        ("TESSERA_MEMORY__KAFKA__TLS__CA_FILE", "/nowhere/ca.pem", "ca_file /nowhere/ca.pem cannot be read"),
        ("TESSERA_MEMORY__KAFKA__TOPIC_PREFIX", "no/slash", "pattern"),
    ],
)
def test_what_does_not_fit_together_is_refused(name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=said):
        MemorySettings()


def test_names_on_the_cluster_carry_the_prefix() -> None:
    kafka = KafkaSettings(topic_prefix="t1.")
    assert kafka.physical("ingest") == "t1.ingest"
    assert kafka.logical("t1.ingest.acme") == "ingest.acme"


def test_credentials_reach_the_client() -> None:
    kafka = KafkaSettings(security_protocol="SASL_PLAINTEXT", sasl_username="u", sasl_password="p")
    connection = kafka.connection("me")
    assert (connection["sasl_mechanism"], connection["sasl_plain_username"], connection["sasl_plain_password"]) == (
        "SCRAM-SHA-512",
        "u",
        "p",
    )
    assert connection["ssl_context"] is None
    assert KafkaSettings(security_protocol="SSL").connection("me")["ssl_context"] is not None


def test_tls_without_effect_is_refused() -> None:
    trusted = ssl.get_default_verify_paths().openssl_cafile
    with pytest.raises(ValidationError, match="tls has no effect with SASL_PLAINTEXT"):
        KafkaSettings.model_validate(
            {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "u", "sasl_password": "p", "tls": {"ca_file": trusted}}
        )


def test_empty_credentials_are_none() -> None:
    assert KafkaSettings(sasl_username="", sasl_password="").sasl_username is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("profile", "mechanism"), [("development", "PLAIN"), ("production", "SCRAM-SHA-512")])
def test_a_password_in_clear_is_for_development(profile: str, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kafka = {"SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SASL_USERNAME": "u", "SASL_PASSWORD": "p", "SASL_MECHANISM": mechanism}
    for name, value in kafka.items():
        monkeypatch.setenv(f"TESSERA__KAFKA__{name}", value)
    monkeypatch.setenv("TESSERA__PROFILE", profile)
    assert MemorySettings().kafka.sasl_mechanism == mechanism
    monkeypatch.setenv("TESSERA__KAFKA__SASL_MECHANISM", "PLAIN")
    monkeypatch.setenv("TESSERA__PROFILE", "production")
    with pytest.raises(ValidationError, match="password in clear"):
        MemorySettings()


def test_the_host_name_is_checked_unless_told_otherwise() -> None:
    for checked in (True, False):
        kafka = KafkaSettings(security_protocol="SSL", tls=KafkaTls(check_hostname=checked))
        assert kafka.connection("me")["ssl_context"].check_hostname is checked


def test_an_unarmed_point_lets_pass() -> None:
    faults.arm("another")
    faults.reach(faults.CONSUMED_BEFORE_COMMIT)
    faults.arm(f"{faults.CONSUMED_BEFORE_COMMIT}:3")
    faults.reach(faults.CONSUMED_BEFORE_COMMIT)
    faults.reach(faults.CONSUMED_BEFORE_COMMIT)
    faults.arm(None)
