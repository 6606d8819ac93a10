import base64
import hashlib
import hmac
import json
import ssl
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tessera.storage import (
    ObjectStoreSettings,
    PostgresSettings,
    RedisSettings,
    StorageConflictError,
    StorageTimeoutError,
    StorageUnavailableError,
)
from tessera.storage.connections import connect_arguments
from tessera.storage.errors import translated
from tessera.storage.problems import explained
from tessera.storage.scram import verifier
from tessera.storage.settings import PostgresTls, postgres_settings

pytestmark = pytest.mark.unit

PASSWORDS = {"TESSERA__POSTGRES__WORKER_PASSWORD": "w", "TESSERA__POSTGRES__CLIENT_PASSWORD": "c"}
SETTINGS = PostgresSettings(worker_password=SecretStr("w"), client_password=SecretStr("c"))


def test_a_services_own_value_wins_over_the_common_one() -> None:
    found = postgres_settings(
        "memory",
        {**PASSWORDS, "TESSERA__POSTGRES__HOST": "common", "TESSERA__POSTGRES__PORT": "1", "TESSERA_MEMORY__POSTGRES__HOST": "own"},
    )
    assert (found.host, found.port, found.worker_password.get_secret_value()) == ("own", 1, "w")


def test_nested_values_are_merged() -> None:
    found = postgres_settings(
        "memory", {**PASSWORDS, "TESSERA__POSTGRES__TLS__MODE": "verify-full", "TESSERA_MEMORY__POSTGRES__TLS__CA_FILE": ""}
    )
    assert found.tls == PostgresTls(mode="verify-full", ca_file=None)


def test_every_wrong_value_is_named_and_no_password_shown() -> None:
    with pytest.raises(ValidationError) as raised:
        postgres_settings(
            "memory", {"TESSERA__POSTGRES__PORT": "x", "TESSERA__POSTGRES__POOL_SIZE": "0", "TESSERA__POSTGRES__WORKER_PASSWORD": "hidden"}
        )
    told = explained(raised.value)
    assert all(name in told for name in ("port", "pool_size", "client_password"))
    assert "hidden" not in told


def test_passwords_are_not_shown() -> None:
    shown = f"{SETTINGS!r} {SETTINGS.model_dump_json()}"
    assert "SecretStr('**********')" in shown
    assert json.loads(SETTINGS.model_dump_json())["worker_password"] == "**********"


def test_a_missing_password_is_named() -> None:
    with pytest.raises(ValueError, match=r"postgres\.authenticator_password is not set"):
        SETTINGS.password("authenticator")


def test_session_settings_go_with_the_log_in() -> None:
    arguments = connect_arguments("memory", "worker", SETTINGS)
    assert arguments["user"] == "tessera_memory_worker"
    assert arguments["server_settings"]["search_path"] == '"memory", public'
    assert arguments["server_settings"]["statement_timeout"] == "15000"


@pytest.mark.parametrize(
    ("mode", "host", "verified"),
    [("require", False, ssl.CERT_NONE), ("verify-ca", False, ssl.CERT_REQUIRED), ("verify-full", True, ssl.CERT_REQUIRED)],
)
def test_tls_modes_mean_what_they_mean_in_libpq(mode: str, host: bool, verified: ssl.VerifyMode) -> None:
    settings = PostgresSettings.model_validate({"worker_password": "w", "client_password": "c", "tls": {"mode": mode}})
    context = connect_arguments("memory", "worker", settings)["ssl"]
    assert (context.check_hostname, context.verify_mode) == (host, verified)


@pytest.mark.parametrize("mode", ["disable", "prefer"])
def test_weak_tls_modes_are_left_to_the_driver(mode: str) -> None:
    settings = PostgresSettings.model_validate({"worker_password": "w", "client_password": "c", "tls": {"mode": mode}})
    assert connect_arguments("memory", "worker", settings)["ssl"] == mode


def test_a_redis_password_leaves_the_address() -> None:
    settings = RedisSettings(url="rediss://me:p%40ss@cache:6380/2")
    assert (settings.url, settings.username) == ("rediss://cache:6380/2", "me")
    assert settings.password is not None
    assert settings.password.get_secret_value() == "p@ss"
    assert "p@ss" not in repr(settings)


def test_objects_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    assert ObjectStoreSettings().url == f"file://{tmp_path}/objects"


def test_the_verifier_is_the_one_of_rfc_7677() -> None:
    """The example exchange of RFC 7677 §3: its server signature follows from the server key computed here."""
    stored = verifier("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="))
    server_key = base64.b64decode(stored.rpartition(":")[2])
    message = (
        "n=user,r=rOprNGfwEbeRWgbNEkqO,"
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,"
        "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    )
    signature = hmac.new(server_key, message.encode(), hashlib.sha256).digest()
    assert base64.b64encode(signature).decode() == "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


@pytest.mark.parametrize("password", ["", "pässword", "tab\there"])
def test_a_password_that_would_need_preparation_is_refused(password: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        verifier(password)


def wrapped(error: asyncpg.PostgresError, *, invalidated: bool = False) -> DBAPIError:
    return DBAPIError("SELECT 1", {}, error, connection_invalidated=invalidated)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (wrapped(asyncpg.DeadlockDetectedError("x")), StorageConflictError),
        (wrapped(asyncpg.SerializationError("x")), StorageConflictError),
        (asyncpg.LockNotAvailableError("x"), StorageConflictError),
        (wrapped(asyncpg.QueryCanceledError("x")), StorageTimeoutError),
        (wrapped(asyncpg.TooManyConnectionsError("x")), StorageUnavailableError),
        (wrapped(asyncpg.CannotConnectNowError("x")), StorageUnavailableError),
        (wrapped(asyncpg.AdminShutdownError("x")), StorageUnavailableError),
        (asyncpg.ConnectionDoesNotExistError("x"), StorageUnavailableError),
        (asyncpg.InterfaceError("connection is closed"), StorageUnavailableError),
        (wrapped(asyncpg.PostgresError("x"), invalidated=True), StorageUnavailableError),
        (PoolTimeoutError("x"), StorageUnavailableError),
        (wrapped(asyncpg.UniqueViolationError("x")), type(None)),
        (asyncpg.InterfaceError("another operation is in progress"), type(None)),
        (KeyError("x"), type(None)),
        (ConnectionResetError("of something else"), type(None)),
    ],
)
def test_driver_errors_mean(error: Exception, meaning: type[object]) -> None:
    assert type(translated(error)) is meaning


def test_explained_is_one_line() -> None:
    assert explained(RuntimeError("first\nsecond")) == "first"
    assert explained(TimeoutError()) == "TimeoutError"
