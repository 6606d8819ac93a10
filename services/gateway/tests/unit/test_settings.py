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
