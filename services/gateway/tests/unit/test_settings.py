"""Settings that a profile refuses."""

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from tessera.gateway.domain import keys
from tessera.gateway.settings import GatewaySettings

pytestmark = pytest.mark.unit

POSTGRES = {"worker_password": "w", "client_password": "c"}


def settings(**given: Any) -> GatewaySettings:
    return GatewaySettings(postgres=POSTGRES, **given)  # type: ignore[arg-type]  # as the environment gives it


def test_development_needs_nothing_and_names_its_keys() -> None:
    assert settings().key_environment == "dev"
    assert settings(profile="test").key_environment == "test"
    assert settings(bootstrap_key="").bootstrap_key is None


def test_a_bootstrap_key_has_to_be_whole_and_is_not_shown() -> None:
    key = keys.generate("dev").reveal()
    assert key not in repr(settings(bootstrap_key=key))
    with pytest.raises(ValidationError, match="development_key") as refused:
        settings(bootstrap_key="secret-of-mine")
    assert "secret-of-mine" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "key_pepper"),
        ({"key_pepper": "short"}, "key_pepper"),
        ({"key_pepper": "p" * 32, "bootstrap_key": keys.generate("dev").reveal()}, "bootstrap_key"),
        ({"key_pepper": "p" * 32, "authentication": "off"}, "authentication must not be off in the profile production"),
    ],
)
def test_production_refuses_defaults_and_the_bootstrap_key(given: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        settings(profile="production", **given)


def test_production_with_a_pepper_of_its_own() -> None:
    made = settings(profile="production", key_pepper=SecretStr("p" * 32))
    assert (made.key_environment, made.pepper) == ("live", b"p" * 32)


def test_a_spool_is_off_until_it_has_a_folder_and_then_kafka_is_not_needed_to_serve() -> None:
    assert (settings().kafka_required, settings(spool={"folder": ""}).spool.folder) == (True, None)
    assert settings(spool={"folder": "/var/lib/tessera/spool"}).kafka_required is False
    with pytest.raises(ValidationError, match="segment_bytes must not exceed"):
        settings(spool={"maximum_bytes": 2**20, "segment_bytes": 2**21})
    with pytest.raises(ValidationError, match=r"ttl_seconds must exceed kafka\.request_timeout_seconds"):
        settings(spool={"ttl_seconds": 10}, kafka={"request_timeout_seconds": 10})


TRUSTED: dict[str, Any] = {"issuer": "https://login.example.com", "audience": "tessera"}


def test_nobodys_tokens_are_taken_until_there_is_an_issuer() -> None:
    assert settings().oidc.trust is None
    assert settings(oidc={"issuer": "", "audience": "", "jwks_url": ""}).oidc.trust is None
    given = settings(oidc={**TRUSTED, "algorithms": ["ES256"], "roles": {"operator": ["admin"]}, "roles_claim": "/realm_access/roles"}).oidc
    assert given.trust is not None
    assert (given.trust.issuer, given.trust.audience) == ("https://login.example.com", "tessera")
    assert given.trust.algorithms == {"ES256"}
    assert given.rights.of({"realm_access": {"roles": ["operator"]}}) == {"admin"}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"audience": "tessera"}, "without an issuer"),
        ({"roles": {"operator": ["admin"]}}, "without an issuer"),
        ({"issuer": "https://login.example.com"}, "audience is needed"),
        ({**TRUSTED, "issuer": "login.example.com"}, "must be an address"),
        ({**TRUSTED, "issuer": "https://user:secret@login.example.com"}, "without a password"),  # pragma: allowlist secret
        ({**TRUSTED, "jwks_url": "file:///etc/passwd"}, "must be an address"),
        ({**TRUSTED, "algorithms": []}, "at least 1"),
        ({**TRUSTED, "algorithms": ["none"]}, "algorithms"),
        ({**TRUSTED, "algorithms": ["RS256", "HS256"]}, "algorithms"),
        ({**TRUSTED, "roles": {"operator": ["admin", "root"]}}, "there is no scope root"),
        ({**TRUSTED, "tenant_claim": ""}, "tenant_claim"),
        ({**TRUSTED, "leeway_seconds": 3_600}, "leeway_seconds"),
        ({**TRUSTED, "keys_kept_seconds": 60}, "keys_kept_seconds"),
    ],
)
def test_trust_that_is_not_whole_ends_the_start(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        settings(oidc=given)


@pytest.mark.parametrize("clear", [{"issuer": "http://login.example.com"}, {"jwks_url": "http://login.example.com/keys"}])
def test_production_fetches_keys_by_https_only(clear: dict[str, str]) -> None:
    settings(oidc={**TRUSTED, **clear})
    with pytest.raises(ValidationError, match="https"):
        settings(profile="production", key_pepper=SecretStr("p" * 32), oidc={**TRUSTED, **clear})
    settings(profile="production", key_pepper=SecretStr("p" * 32), oidc=TRUSTED)


def test_trust_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"ISSUER": "https://login.example.com", "AUDIENCE": "tessera", "ALGORITHMS": '["RS256", "EdDSA"]', "ROLES": '{"Ops": ["admin"]}'}
    for name, value in said.items():
        monkeypatch.setenv(f"TESSERA_GATEWAY__OIDC__{name}", value)
    found = settings().oidc
    assert found.algorithms == {"RS256", "EdDSA"}
    assert found.roles == {"Ops": {"admin"}}
