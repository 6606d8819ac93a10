"""Addresses of servers that are already there and cannot be used: one sentence, with the reason and without the password."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.local import cli, environment
from tessera.local.folders import home
from tessera.local.ports import LOOPBACK


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """Where nobody listens. Held, else the platform may choose the same port for itself and take the address for its own."""
    with socket.socket() as held:
        held.bind((LOOPBACK, 0))
        yield f"{LOOPBACK}:{held.getsockname()[1]}"


@pytest.fixture
def address(request: pytest.FixtureRequest, silent: str) -> str:
    return str(request.param).format(silent=silent)


@pytest.fixture(autouse=True)
def _nothing_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for aliases in environment.GIVEN.values():
        for name in aliases:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("TESSERA_URL", raising=False)


@pytest.mark.parametrize(
    ("name", "address", "reason"),
    [
        ("DATABASE_URL", "postgresql://me:secret@{silent}/postgres", "Connect call failed"),  # pragma: allowlist secret
        ("DATABASE_URL", "nonsense", "DSN"),
        ("DATABASE_URL", "postgresql://me:secret@localhost:port/postgres", "port"),  # pragma: allowlist secret
        ("REDIS_URL", "redis://:secret@{silent}/0", "refused"),
        ("REDIS_URL", "nonsense", "redis://"),
        ("REDIS_URL", "redis://:secret@localhost:port/0", "port"),
        ("KAFKA_BOOTSTRAP_SERVERS", "{silent}", "Connect call failed"),
    ],
    indirect=["address"],
)
def test_an_address_that_is_of_no_use_is_told(
    name: str, address: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, address)
    assert cli.main(["run"]) == 1
    sentence, _, details = capsys.readouterr().err.partition("\n")
    assert sentence.startswith(f"{name} is set, but nothing that can be used answers there. Correct it, or remove it")
    assert reason in details
    assert "secret" not in details
    assert "Traceback" not in details
    assert not (home() / "run").exists()


def test_addresses_that_another_checkout_exported_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, silent: str
) -> None:
    monkeypatch.setenv("TESSERA_URL", f"http://{LOOPBACK}:1")
    monkeypatch.setenv("REDIS_URL", f"redis://:secret@{silent}/0")
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://me:secret@db/postgres\n")  # pragma: allowlist secret
    assert cli.main(["run"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"REDIS_URL in this shell came with http://{LOOPBACK}:1 from `make env`")
    assert told.endswith("unset TESSERA_URL TESSERA_API_KEY REDIS_URL\n")
