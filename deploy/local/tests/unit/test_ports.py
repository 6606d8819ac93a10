import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.local.errors import PortTakenError
from tessera.local.files import replace_text
from tessera.local.ports import LOOPBACK, accepts_connections, free_port, free_ports, is_free, remembered_ports


@pytest.fixture
def busy() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_with_a_listener_is_not_free(busy: int) -> None:
    assert not is_free(busy)
    assert accepts_connections(f"{LOOPBACK}:{busy}")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:", "127.0.0.1:1"])
def test_an_address_without_a_listener_accepts_nothing(address: str) -> None:
    assert not accepts_connections(address)


def test_every_name_gets_a_port_of_its_own() -> None:
    chosen = free_ports("abcdefgh")
    assert len(set(chosen.values())) == 8
    assert all(is_free(port) for port in chosen.values())


def test_when_every_port_is_excluded_the_error_says_so() -> None:
    with pytest.raises(PortTakenError, match="No free port"):
        free_port(range(65536))


def test_ports_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    first = remembered_ports(file, ["kafka", "redis"])
    assert remembered_ports(file, ["kafka", "redis"]) == first
    assert json.loads(file.read_text()) == first


def test_a_remembered_port_that_somebody_took_is_replaced(tmp_path: Path, busy: int) -> None:
    file = tmp_path / "ports.json"
    file.write_text(json.dumps({"kafka": busy}))
    assert remembered_ports(file, ["kafka"])["kafka"] != busy


def test_a_busy_port_of_our_own_live_program_is_kept(tmp_path: Path, busy: int) -> None:
    file = tmp_path / "ports.json"
    file.write_text(json.dumps({"kafka": busy}))
    assert remembered_ports(file, ["kafka"], in_use_by_us=["kafka"])["kafka"] == busy


def test_a_new_name_gets_a_port_beside_the_remembered_ones(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    first = remembered_ports(file, ["kafka"])
    second = remembered_ports(file, ["kafka", "redis"])
    assert second["kafka"] == first["kafka"]
    assert second["redis"] != second["kafka"]


def test_a_port_that_is_spoken_for_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, other = free_ports(["given", "other"]).values()
    offered = iter([given, given, other])
    monkeypatch.setattr("tessera.local.ports.random.choice", lambda _: next(offered))
    assert remembered_ports(tmp_path / "ports.json", ["redis"], spoken_for=[given]) == {"redis": other}


def test_replaced_text_has_the_mode_and_leaves_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "secret"
    replace_text(file, "one")
    replace_text(file, "two", mode=0o600)
    assert file.read_text() == "two"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]
