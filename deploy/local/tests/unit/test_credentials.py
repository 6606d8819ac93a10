import stat
from pathlib import Path

from tessera.local.credentials import Credentials


def test_a_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "secrets.json"
    first = Credentials(file)["postgres"]
    assert Credentials(file)["postgres"] == first
    assert len(first) >= 40
    assert first.isalnum()


def test_secrets_differ_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "secrets.json"
    credentials = Credentials(file)
    assert credentials["postgres"] != credentials["redis"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_secret_of_a_form_of_its_own_is_made_once(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path / "secrets.json")
    assert credentials.kept("key", lambda: "first") == "first"
    assert credentials.kept("key", lambda: "second") == "first"


def test_two_holders_of_the_file_do_not_lose_each_others_secrets(tmp_path: Path) -> None:
    one, two = (Credentials(tmp_path / "secrets.json") for _ in range(2))
    postgres, redis = one["postgres"], two["redis"]
    assert two["postgres"] == postgres
    assert Credentials(tmp_path / "secrets.json")["redis"] == redis
