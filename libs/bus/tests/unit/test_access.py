"""Rights from the catalogue, and the command that prints them. What the broker makes of them: tests/integration."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus import make_acls
from tessera.bus.access import Grant, Operation, Pattern, Resource, Right, command_lines, service_rights, tenant_rights
from tessera.bus.make_acls import Request
from tessera.bus.settings import KafkaSettings
from tessera.contracts.catalogue import SERVICES, TOPICS
from tessera.contracts.errors import InvalidError

pytestmark = pytest.mark.unit

KAFKA = KafkaSettings(topic_prefix="p.")
ADMINISTRATION = {Operation.CREATE, Operation.DESCRIBE}


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_is_given_a_prefix_that_is_not_its_tenants(service: str) -> None:
    prefixes = {right.name for right in service_rights(service) if right.pattern is Pattern.PREFIXED}
    assert prefixes <= {f"{topic.name}." for topic in TOPICS.values() if topic.per_tenant}


@pytest.mark.parametrize("service", SERVICES)
def test_only_who_makes_tenants_makes_topics(service: str) -> None:
    assert bool(ADMINISTRATION & {right.operation for right in service_rights(service)}) == (service == "gateway")


def test_a_prefix_does_not_reach_dead_letters() -> None:
    denied = Right(Operation.WRITE, "ingest.memory.dlq", allowed=False)
    assert denied in service_rights("gateway")
    assert Right(Operation.WRITE, "ingest.memory.dlq") in service_rights("memory")
    assert Right(Operation.READ, "ingest.memory.dlq", allowed=False) in service_rights("memory")


def test_services_that_share_a_principal_keep_every_right() -> None:
    grants = Request(service_principal="User:all").grants(KAFKA)
    letters = Grant("User:all", Resource.TOPIC, Pattern.LITERAL, "p.ingest.memory.dlq", Operation.WRITE)
    assert letters in grants
    assert not [grant for grant in grants if not grant.allowed and grant.operation is Operation.WRITE]


@pytest.mark.parametrize("tenant", ["", "*", "a.b", "Acme", "memory.dlq"])
def test_what_is_no_tenant_gets_no_rights(tenant: str) -> None:
    with pytest.raises(InvalidError, match="is not a tenant's id"):
        tenant_rights(tenant)


def test_a_tenant_named_like_a_service_or_an_administrator_is_neither() -> None:
    mine = {grant for grant in Request(tenants=("admin", "memory")).grants(KAFKA) if "tenant-" in grant.principal}
    assert {grant.principal for grant in mine} == {"User:tenant-admin", "User:tenant-memory"}
    assert {grant.name for grant in mine if grant.resource is Resource.GROUP} == {"p.refused.admin", "p.refused.memory"}


names = st.text("abcdefghijklmnopqrstuvwxyz.'\" $", min_size=1, max_size=20)
anything = st.builds(Grant, names, st.sampled_from(Resource), st.sampled_from(Pattern), names, st.sampled_from(Operation), st.booleans())


@given(st.sets(anything, max_size=12))
def test_printed_lines_say_every_grant_once(grants: set[Grant]) -> None:
    assert sorted(grant for line in command_lines(grants, "k:1") for grant in _parsed(shlex.split(line))) == sorted(grants)


def _parsed(words: list[str]) -> list[Grant]:
    pairs = [*zip(words[6::2], words[7::2], strict=True)]
    options = dict(pairs[:3])
    allowed = "--allow-principal" in options
    principal = options["--allow-principal" if allowed else "--deny-principal"]
    how, what = Pattern(options["--resource-pattern-type"]), Operation(options["--operation"])
    return [Grant(principal, Resource(kind.removeprefix("--")), how, name, what, allowed) for kind, name in pairs[3:]]


def test_the_command_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TESSERA__KAFKA__BOOTSTRAP_SERVERS", "k:9093")
    monkeypatch.setenv("TESSERA__KAFKA__TOPIC_PREFIX", "p.")
    assert make_acls.main(["--tenant", "acme", "--shared-producers", "User:crm"]) == 0
    told = capsys.readouterr().out
    assert "--bootstrap-server k:9093" in told
    assert "--allow-principal User:tenant-acme --operation Write --resource-pattern-type literal --topic p.ingest.acme\n" in told
    assert "--allow-principal User:crm --operation Write --resource-pattern-type literal --topic p.ingest\n" in told


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--tenant", "No"], 1, "is not a tenant's id"),
        (["--service-principal", "{role}"], 2, "role"),
        (["--apply"], 1, "Unable to bootstrap"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TESSERA__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    assert make_acls.main(arguments) == code
    assert said in capsys.readouterr().err


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TESSERA__KAFKA__SECURITY_PROTOCOL", "TLS")
    assert make_acls.main([]) == 2
    assert "security_protocol" in capsys.readouterr().err


def test_a_service_reads_and_writes_its_own_retry_topics_and_nobody_else_does() -> None:
    name = "text.tokenized.generator.retry.5s"
    assert {Right(Operation.READ, name), Right(Operation.WRITE, name)} <= set(service_rights("generator"))
    for service in set(SERVICES) - {"generator"}:
        assert name not in {right.name for right in service_rights(service)}
