"""What a plan gives to whom."""

from pathlib import Path

import pytest

from tessera.local import environment
from tessera.local.environment import SERVICES, given_addresses, hosts
from tessera.local.plan import Plan, digest, port_names
from tessera.local.ports import free_ports
from tessera.local.settings import LocalSettings


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for aliases in environment.GIVEN.values():
        for name in aliases:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    settings = LocalSettings()
    return Plan(tmp_path / "home", settings, free_ports(port_names(settings)), {})


def test_two_gateways_share_a_port_and_have_their_own_admin_ports(plan: Plan) -> None:
    gateways = [instance for instance in plan.instances if instance.service == "gateway"]
    variables = [plan.instance_environment(instance) for instance in gateways]
    assert len(gateways) == 2
    assert len({given["TESSERA_GATEWAY__PORT"] for given in variables}) == 1
    assert len({given["TESSERA_GATEWAY__ADMIN_PORT"] for given in variables}) == 2
    assert {instance.service for instance in plan.instances} == set(SERVICES)


def test_a_running_service_gets_only_its_own_passwords_and_no_owners(plan: Plan) -> None:
    for instance in plan.instances:
        passwords = {name for name in plan.instance_environment(instance) if name.endswith("_PASSWORD")}
        prefix = f"TESSERA_{instance.service.upper()}__POSTGRES__"
        assert passwords
        assert all(name.startswith(prefix) for name in passwords)
        assert f"{prefix}OWNER_PASSWORD" not in passwords


def test_the_operator_has_every_role_and_the_administrator(plan: Plan) -> None:
    variables = plan.operator_environment()
    assert all(f"TESSERA_{service.upper()}__POSTGRES__OWNER_PASSWORD" in variables for service in SERVICES)
    assert variables["TESSERA_ADMIN_DATABASE_URL"] == plan.addresses.database_url


def test_clients_get_five_variables(plan: Plan) -> None:
    variables = plan.client_environment()
    assert list(variables) == ["TESSERA_URL", "TESSERA_API_KEY", "KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "REDIS_URL"]
    assert variables["DATABASE_URL"].endswith("/tessera")
    assert variables["TESSERA_API_KEY"].startswith("tsr_dev_")


def test_files_with_variables_are_for_the_owner_alone(plan: Plan) -> None:
    plan.programs()
    files = list((plan.home / "run" / "environments").iterdir())
    assert len(files) == len(plan.instances)
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_no_secret_stands_in_an_argument_list(plan: Plan) -> None:
    words = " ".join(word for program in plan.programs() for word in program.command.launched())
    plan.client_environment()
    assert not any(secret in words for secret in plan.credentials._known.values())


def test_a_given_address_replaces_the_server(tmp_path: Path) -> None:
    settings = LocalSettings()
    plan = Plan(
        tmp_path,
        settings,
        free_ports(port_names(settings)),
        {"KAFKA_BOOTSTRAP_SERVERS": "broker:9092", "REDIS_URL": "redis://cache:6379/0"},
    )
    assert [server.name for server in plan.servers] == ["postgres"]
    assert plan.addresses.kafka_bootstrap_servers == "broker:9092"
    assert plan.instance_environment(plan.instances[0])["TESSERA__REDIS__URL"] == "redis://cache:6379/0"


def test_the_fingerprint_follows_the_variables(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = plan.instances[0]
    before = plan.fingerprint(instance)
    assert plan.fingerprint(instance) == before
    monkeypatch.setenv("TESSERA_GATEWAY__KEEP_ALIVE_SECONDS", "7")
    assert plan.fingerprint(instance) != before


def test_a_setting_of_one_service_reaches_only_that_service(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {instance.name: plan.fingerprint(instance) for instance in plan.instances}
    monkeypatch.setenv("TESSERA_MEMORY__DRAIN_SECONDS", "7")
    assert [instance.name for instance in plan.instances if plan.fingerprint(instance) != before[instance.name]] == ["memory"]


def test_the_digest_follows_contents_and_ignores_compiled_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.local.plan.CHECKOUT", tmp_path)
    (tmp_path / "code" / "__pycache__").mkdir(parents=True)
    (tmp_path / "code" / "a.py").write_text("1")
    before = digest([tmp_path / "code", tmp_path / "absent"])
    (tmp_path / "code" / "__pycache__" / "a.pyc").write_text("x")
    assert digest([tmp_path / "code", tmp_path / "absent"]) == before
    (tmp_path / "code" / "a.py").write_text("2")
    assert digest([tmp_path / "code", tmp_path / "absent"]) != before


@pytest.mark.parametrize("name", ["KAFKA_BOOTSTRAP_SERVERS", "TESSERA__KAFKA__BOOTSTRAP_SERVERS"])
def test_an_address_in_the_environment_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "broker:9092")
    assert given_addresses({}) == {"KAFKA_BOOTSTRAP_SERVERS": "broker:9092"}


def test_an_address_in_the_settings_file_is_given(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("REDIS_URL=redis://cache:6379/0\n")
    assert given_addresses({}) == {"REDIS_URL": "redis://cache:6379/0"}


def test_what_make_env_exported_is_not_taken_for_a_given_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:2000")
    assert given_addresses({"kafka": 2000}) == {}
    assert given_addresses({"kafka": 200}) == {"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:2000"}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("one:9092, two:9093", ["one:9092", "two:9093"]),
        ("postgresql://me:secret@db:5432/postgres?sslmode=require", ["db:5432"]),  # pragma: allowlist secret
        ("redis://:secret@cache:6379/0", ["cache:6379"]),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, expected: list[str]) -> None:
    assert hosts(address) == expected


def test_clients_of_a_given_database_keep_what_its_address_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA__POSTGRES__DATABASE", "second")
    settings = LocalSettings()
    given = {"DATABASE_URL": "postgresql://me:secret@db:5432?sslmode=require"}  # pragma: allowlist secret
    variables = Plan(tmp_path / "home", settings, free_ports(port_names(settings)), given).client_environment()
    assert variables["DATABASE_URL"] == "postgresql://me:secret@db:5432/second?sslmode=require"  # pragma: allowlist secret
