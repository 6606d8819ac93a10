"""Kafka, Postgres and Redis behind TLS: the platform works, each service under a principal of its own, and is refused everything else."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from confluent_kafka import OFFSET_BEGINNING, Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AclBinding, AclOperation, AclPermissionType, AdminClient, ResourcePatternType, ResourceType
from confluent_kafka.cimpl import NewTopic

from tessera.bus.access import command_lines
from tessera.bus.make_acls import Request, apply
from tessera.bus.settings import KafkaSettings, KafkaTls
from tessera.bus.topics import TopicDirectory, ensure_all
from tessera.contracts.catalogue import RETRY_TOPICS, SERVICES, TOPICS, Mode, catalogued, consumer_group, dead_letter_topic
from tessera.contracts.errors import FatalError, RetryableError
from tessera.local.certificates import Authority
from tessera.local.errors import LocalError
from tessera.local.kafka import cached_distribution
from tessera.local.platform import Platform as LocalPlatform
from tessera.local.settings import LocalSettings
from tessera.testkit import ServiceProcess, eventually_blocking
from tessera.testkit.platform import Platform
from tessera.testkit.secured import SecuredStack, principal
from tessera.testkit.tls_proxy import TlsProxy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

TENANT, NEIGHBOUR, SHARED, OUTSIDER = "acme", "globex", "crm", "outsider"
PREFIX = "table."
PATIENCE_SECONDS = 60.0
READ_SECONDS = 30.0
REFUSED = {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}
Client = dict[str, str]


@pytest.fixture(scope="module")
def secured() -> Iterator[SecuredStack]:
    started = SecuredStack(users=(f"tenant-{TENANT}", f"tenant-{NEIGHBOUR}", SHARED, OUTSIDER))
    started.start()
    yield started
    started.stop()


# --- the platform ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guarded:
    """The platform on the secured stack, and a tenant's key. At the end of the tests nothing that a service did was refused."""

    platform: Platform
    key: str

    def status(self, event: str) -> str:
        return str(self.platform.request("GET", f"/v1/ingest/{event}", key=self.key).json()["status"])


@pytest.fixture(scope="module")
def guarded(secured: SecuredStack) -> Iterator[Guarded]:
    platform = Platform(secured)
    try:
        platform.start()
        key = platform.tenant(TENANT)
        platform.command("tessera.bus.make_acls", "--apply", "--tenant", TENANT)
        yield Guarded(platform, key)
        refused = [record for process in platform.processes.values() for record in process.log_records() if "uthorization" in str(record)]
        assert not refused, refused[:3]
    finally:
        platform.stop()


def test_make_run_asks_a_given_kafka_as_the_services_will(secured: SecuredStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", secured.kafka_bootstrap_servers)
    given = LocalPlatform(tmp_path, LocalSettings(), choose_ports=True)
    with pytest.raises(LocalError, match="reachable"):
        given._check_given()
    for name, value in secured.environment(None).items():
        if name.startswith("TESSERA__KAFKA__"):
            monkeypatch.setenv(name, value)
    LocalPlatform(tmp_path, LocalSettings(), choose_ports=True)._check_given()


def test_what_is_told_is_found_and_quoted(guarded: Guarded) -> None:
    platform, key = guarded.platform, guarded.key
    item = {"type": "message", "id": "m-1", "conversation_id": "c", "role": "user", "content": "The spare key is under the blue flowerpot."}
    platform.request("POST", "/v1/memories", key=key, json=item).raise_for_status()
    eventually_blocking(lambda: guarded.status("m-1") == "searchable", PATIENCE_SECONDS)
    found = platform.request("POST", "/v1/memories/search", key=key, json={"query": "Where is the spare key?"}).json()["data"]
    assert found[0]["text"] == item["content"]
    question = {"model": "local/quote", "messages": [{"role": "user", "content": "Where is the spare key?"}], "tessera": {"memory": {}}}
    answer = platform.request("POST", "/v1/chat/completions", key=key, json=question).raise_for_status().json()
    assert "blue flowerpot" in answer["choices"][0]["message"]["content"]


def test_retention_and_validation_work(guarded: Guarded) -> None:
    platform, key = guarded.platform, guarded.key
    platform.request("PUT", "/v1/retention/policy", key=key, json={"max_age_days": 1}).raise_for_status()
    sweep = platform.request("POST", "/v1/retention/sweeps", key=key, json={"dry_run": True}).raise_for_status().json()
    table = "a,b\n" + "\n".join(f"{number},{number * number % 7}" for number in range(60))
    dataset = platform.request("POST", "/v1/datasets", key=key, files={"file": ("t.csv", table)}).raise_for_status().json()["id"]
    validation = platform.request("POST", "/v1/validations", key=key, json={"dataset": dataset}).raise_for_status().json()["id"]
    for path in (f"/v1/retention/sweeps/{sweep['id']}", f"/v1/validations/{validation}"):
        eventually_blocking(lambda: _finished(platform, key, path), PATIENCE_SECONDS)  # noqa: B023


def _finished(platform: Platform, key: str, path: str) -> bool:
    return platform.request("GET", path, key=key).json().get("status") in {"planned", "completed"}


def test_a_tenants_own_producer_publishes_and_reads_its_refusals(guarded: Guarded, secured: SecuredStack) -> None:
    producer, prefix = Producer(secured.client(f"tenant-{TENANT}")), guarded.platform.kafka_prefix
    common = {"ce_specversion": "1.0", "ce_source": "/crm", "ce_type": "tessera.message.published.v1", "content-type": "application/json"}
    good = b'{"conversation_id": "c", "role": "user", "content": "Told by Kafka."}'
    for event, value in (("good", good), ("bad", b"{}")):
        producer.produce(f"{prefix}ingest.{TENANT}", value, headers={**common, "ce_id": event})
    assert producer.flush(PATIENCE_SECONDS) == 0
    eventually_blocking(lambda: guarded.status("good") == "searchable", PATIENCE_SECONDS)
    reader = Consumer({**secured.client(f"tenant-{TENANT}"), "group.id": f"{prefix}refused.{TENANT}", "auto.offset.reset": "earliest"})
    reader.subscribe([f"{prefix}refused.{TENANT}"])
    told: list[bytes] = []

    def heard() -> bool:
        for message in reader.consume(10, 1.0):
            assert message.error() is None, message.error()
            told.append(message.value() or b"")
        return any(b'"bad"' in value for value in told)

    eventually_blocking(heard, PATIENCE_SECONDS)
    reader.close()


def test_an_operator_sees_and_replays_dead_letters(guarded: Guarded, secured: SecuredStack) -> None:
    """What is still wrong comes back as another letter: it was read, published again, refused again."""
    platform, event = guarded.platform, "never-good"
    headers = {"ce_specversion": "1.0", "ce_id": event, "ce_source": "/crm", "ce_type": "tessera.message.published.v1"}
    producer = Producer(secured.client(f"tenant-{TENANT}"))
    producer.produce(f"{platform.kafka_prefix}ingest.{TENANT}", b"{}", headers=headers)
    assert producer.flush(PATIENCE_SECONDS) == 0
    (first,) = eventually_blocking(lambda: _letters(platform, event), PATIENCE_SECONDS)
    answer = platform.request("POST", "/v1/dead-letters/replay", json={"filter": {"event_id": event}}).raise_for_status().json()
    assert [letter["result"] for letter in answer["data"]] == ["replayed"]
    eventually_blocking(lambda: set(_letters(platform, event)) - {first}, PATIENCE_SECONDS)


def _letters(platform: Platform, event: str) -> list[str]:
    page = platform.request("GET", f"/v1/dead-letters?event_id={event}").raise_for_status().json()
    return [letter["id"] for letter in page["data"]]


def test_postgres_and_redis_are_reached_through_tls(guarded: Guarded, secured: SecuredStack) -> None:
    assert guarded.platform.request("GET", "/v1/status").json()
    assert secured.postgres_proxy.connections >= len(SERVICES)
    assert secured.redis_proxy.connections >= 1


# --- who may do what ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Topics with one record each, and the access control lists of the catalogue."""

    stack: SecuredStack
    topics: tuple[str, ...]

    def client(self, service: str, way: str) -> Client:
        return self.stack.mutual_client(service) if way == "certificate" else self.stack.client(principal(service))


def _administrator(secured: SecuredStack, **changes: object) -> KafkaSettings:
    return KafkaSettings.model_validate(
        {
            "bootstrap_servers": secured.kafka_bootstrap_servers,
            "topic_prefix": PREFIX,
            "keyed_partitions": 1,
            "security_protocol": "SASL_SSL",
            "sasl_username": "admin",
            "sasl_password": secured.passwords["admin"],
            "tls": {"ca_file": secured.authority.ca_file},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def table(secured: SecuredStack) -> Table:
    kafka = _administrator(secured)
    made = asyncio.run(ensure_all(kafka, tenants=(TENANT, NEIGHBOUR)))
    grants = Request(tenants=(TENANT, NEIGHBOUR), shared_producers=(f"User:{SHARED}",)).grants(kafka)
    asyncio.run(apply(kafka, grants))
    assert _written(secured.client("admin"), made) == set(made)
    return Table(secured, tuple(made))


def _written(client: Client, topics: Sequence[str]) -> set[str]:
    """The topics that took a record; from all others the refusal was read."""
    producer = Producer({**client, "linger.ms": 0})
    answers: dict[str, KafkaError | None] = {}
    for topic in topics:
        producer.produce(PREFIX + topic, b"{}", b"key", 0, on_delivery=lambda error, message: answers.update({message.topic(): error}))
    assert producer.flush(PATIENCE_SECONDS) == 0
    strange = {topic: error for topic, error in answers.items() if error is not None and error.code() not in REFUSED}
    assert not strange
    return {topic for topic in topics if answers[PREFIX + topic] is None}


def _read(client: Client, topics: Sequence[str]) -> set[str]:
    """The topics that gave a record; from all others the refusal was read."""
    consumer = Consumer({**client, "group.id": "none", "enable.auto.commit": False})
    shown = [topic for topic in topics if _shown(consumer, PREFIX + topic)]
    consumer.assign([TopicPartition(PREFIX + topic, 0, OFFSET_BEGINNING) for topic in shown])
    answers: dict[str, bool] = {}
    deadline = time.monotonic() + READ_SECONDS
    while len(answers) < len(shown):
        assert time.monotonic() < deadline, f"no answer for {sorted({PREFIX + topic for topic in shown} - set(answers))}"
        for message in consumer.consume(100, 0.2):
            error, topic = message.error(), str(message.topic())
            if error is None:
                answers[topic] = True
            elif error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                answers[topic] = False
            else:
                assert error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED, error
    consumer.close()
    return {topic for topic in shown if answers[PREFIX + topic]}


def _shown(consumer: Consumer, topic: str) -> bool:
    """Whether the broker describes the topic at all; librdkafka asks again and again, silently, for one that it does not."""
    error = consumer.list_topics(topic, timeout=READ_SECONDS).topics[topic].error
    assert error is None or error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED, error
    return error is None


def _dead_letters() -> dict[str, str]:
    """Topic → the service whose dead letters it holds."""
    return {
        dead_letter_topic(topic.name, consumer.service): consumer.service
        for topic in TOPICS.values()
        for consumer in topic.consumers
        if consumer.mode is not Mode.BROADCAST
    }


def _retries() -> dict[str, str]:
    """Topic → the service whose events wait in it: nobody else writes or reads it."""
    return {name: retry.consumer.service for name, retry in RETRY_TOPICS.items()}


def _has_dead_letters(topic: str) -> bool:
    return any(consumer.mode is not Mode.BROADCAST for consumer in catalogued(topic).consumers)


WAYS = ("password", "certificate")
OPERATED_THROUGH = "gateway"
"""Reads every dead letter and publishes again what is replayed."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_writes_what_the_catalogue_says_and_nothing_else(table: Table, service: str, way: str) -> None:
    own = _dead_letters() | _retries()
    mine = {topic for topic in table.topics if (own[topic] == service if topic in own else service in catalogued(topic).producers)}
    if service == OPERATED_THROUGH:
        mine |= {topic for topic in table.topics if topic not in own and _has_dead_letters(topic)}
    assert _written(table.client(service, way), table.topics) == mine


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_reads_what_the_catalogue_says_and_nothing_else(table: Table, service: str, way: str) -> None:
    letters, retries = _dead_letters(), _retries()
    mine = {topic for topic in table.topics if topic not in letters | retries and catalogued(topic).consumer(service)}
    mine |= {topic for topic, owner in retries.items() if owner == service}
    if service == OPERATED_THROUGH:
        mine |= letters.keys()
    assert _read(table.client(service, way), table.topics) == mine


@pytest.mark.parametrize(("tenant", "other"), [(TENANT, NEIGHBOUR), (NEIGHBOUR, TENANT)])
def test_a_tenants_producers_reach_their_own_topics_only(table: Table, tenant: str, other: str) -> None:
    client = table.stack.client(f"tenant-{tenant}")
    assert _written(client, table.topics) == {f"ingest.{tenant}"}
    assert _read(client, table.topics) == {f"refused.{tenant}"}
    assert _group_usable(client, f"refused.{tenant}", f"refused.{tenant}")
    assert not _group_usable(client, f"refused.{other}", f"refused.{tenant}")


def test_the_operators_own_producers_reach_the_shared_topic_only(table: Table) -> None:
    client = table.stack.client(SHARED)
    assert _written(client, table.topics) == {"ingest"}
    assert _read(client, table.topics) == {"refused", f"refused.{TENANT}", f"refused.{NEIGHBOUR}"}


def test_whoever_has_no_line_may_do_nothing(table: Table) -> None:
    client = table.stack.client(OUTSIDER)
    assert _written(client, table.topics) == set()
    assert _read(client, table.topics) == set()


def _group_usable(client: Client, group: str, topic: str) -> bool:
    offsets = ConsumerGroupTopicPartitions(PREFIX + group, [TopicPartition(PREFIX + topic, 0, 0)])
    administrator = AdminClient(client)
    try:
        administrator.alter_consumer_group_offsets([offsets])[offsets.group_id].result(PATIENCE_SECONDS)
    except KafkaException as error:
        assert error.args[0].code() in REFUSED, error  # noqa: PT017 - both outcomes are answers
        return False
    return True


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_uses_its_own_groups_only(table: Table, service: str) -> None:
    groups = {
        consumer_group(consumer.service, consumer.traffic_class): consumer.service
        for topic in TOPICS.values()
        for consumer in topic.consumers
        if consumer.mode is not Mode.BROADCAST
    }
    client = table.stack.client(principal(service))
    usable = {group for group in (*groups, f"refused.{TENANT}", "foreign") if _group_usable(client, group, "service.control")}
    assert usable == {group for group, owner in groups.items() if owner == service}


def _refused(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except KafkaException as error:
        assert error.args[0].code() in REFUSED | {KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED}, error  # noqa: PT017
        return True
    return False


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_administers_nothing_but_new_tenants(table: Table, service: str) -> None:
    client = table.stack.client(principal(service))
    administrator = AdminClient(client)

    def create(topic: str) -> None:
        administrator.create_topics([NewTopic(PREFIX + topic, 1)])[PREFIX + topic].result(PATIENCE_SECONDS)

    mine = (f"User:{principal(service)}", "*", AclOperation.ALL, AclPermissionType.ALLOW)
    everything = AclBinding(ResourceType.TOPIC, "*", ResourcePatternType.LITERAL, *mine)
    producer = Producer({**client, "transactional.id": f"{PREFIX}{service}"})
    assert _refused(lambda: create(f"ingest.new-{service}")) == (service != "gateway")
    assert _refused(lambda: create(f"other-{service}"))
    assert _refused(lambda: administrator.delete_topics([f"{PREFIX}ingest"])[f"{PREFIX}ingest"].result(PATIENCE_SECONDS))
    assert _refused(lambda: administrator.create_acls([everything])[everything].result(PATIENCE_SECONDS))
    assert _refused(lambda: producer.init_transactions(PATIENCE_SECONDS))


def test_the_printed_lines_give_the_same_rights(table: Table, tmp_path: Path) -> None:
    """Kafka's own program runs the lines of one service; then nothing is left to add."""
    kafka = _administrator(table.stack, topic_prefix="printed.")
    grants = {grant for grant in Request().grants(kafka) if grant.principal == f"User:{principal('memory')}"}
    module = "org.apache.kafka.common.security.scram.ScramLoginModule"
    (tmp_path / "administrator.properties").write_text(
        "security.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nssl.truststore.type=PEM\n"
        f"ssl.truststore.location={table.stack.authority.ca_file}\n"
        f'sasl.jaas.config={module} required username="admin" password="{table.stack.passwords["admin"]}";\n'
    )
    program = tmp_path / "kafka-acls.sh"
    java = shutil.which("java")
    quick, classes = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC", cached_distribution().class_path
    program.write_text(f'#!/bin/sh\nexec {java} {quick} -cp "{classes}" org.apache.kafka.tools.AclCommand "$@"\n')
    program.chmod(0o700)
    for line in command_lines(grants, kafka.bootstrap_servers):
        done = subprocess.run(["sh", "-c", f"./{line}"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert asyncio.run(apply(kafka, grants)) == (set(), set())


def test_what_the_catalogue_no_longer_gives_is_told_and_taken_away(table: Table) -> None:
    kafka = _administrator(table.stack, topic_prefix="upgraded.")
    full = {grant for grant in Request().grants(kafka) if grant.principal == f"User:{principal('validator')}"}
    kept = set(sorted(full)[1:])
    asyncio.run(apply(kafka, full))
    assert asyncio.run(apply(kafka, kept)) == (set(), full - kept)
    asyncio.run(apply(kafka, kept, remove_others=True))
    assert asyncio.run(apply(kafka, kept)) == (set(), set())
    assert asyncio.run(apply(kafka, full)) == (full - kept, set())


def test_who_is_no_administrator_cannot_give_rights(table: Table) -> None:
    kafka = _administrator(table.stack, sasl_username=principal("gateway"), sasl_password=table.stack.passwords[principal("gateway")])
    with pytest.raises(FatalError, match="the cluster refused"):
        asyncio.run(apply(kafka, Request().grants(kafka)))


# --- who gets in ----------------------------------------------------------------------------------------------------------


def _reached(kafka: KafkaSettings) -> bool:
    directory = TopicDirectory(kafka, "test")

    async def look() -> bool:
        try:
            await directory.start()
            return await directory.exists("ingest")
        except RetryableError:
            return False
        finally:
            await directory.stop()

    return asyncio.run(look())


def _with_certificate(secured: SecuredStack, **tls: object) -> KafkaSettings:
    servers = secured.mutual_client("memory")["bootstrap.servers"]
    files = {"ca_file": secured.authority.ca_file, **tls}
    return KafkaSettings.model_validate(
        {"bootstrap_servers": servers, "topic_prefix": PREFIX, "security_protocol": "SSL", "tls": files, "request_timeout_seconds": 5}
    )


def test_a_wrong_password_does_not_get_in(table: Table) -> None:
    assert _reached(_administrator(table.stack))
    assert not _reached(_administrator(table.stack, sasl_password="wrong"))


def test_nobody_gets_in_without_tls(table: Table) -> None:
    plain = KafkaSettings(bootstrap_servers=table.stack.kafka_bootstrap_servers, request_timeout_seconds=5, topic_prefix=PREFIX)
    assert not _reached(plain)


def test_only_certificates_of_the_authority_get_in(table: Table, tmp_path: Path) -> None:
    mine = table.stack.authority.issue(principal("memory"))
    stranger = Authority(tmp_path)
    stranger.create()
    theirs = stranger.issue(principal("memory"))
    assert _reached(_with_certificate(table.stack, certificate_file=mine.certificate_file, key_file=mine.key_file))
    assert not _reached(_with_certificate(table.stack, certificate_file=theirs.certificate_file, key_file=theirs.key_file))
    assert not _reached(_with_certificate(table.stack))


def test_a_broker_of_a_strange_authority_is_not_believed(table: Table, tmp_path: Path) -> None:
    stranger = Authority(tmp_path)
    stranger.create()
    assert not _reached(_administrator(table.stack, tls=KafkaTls(ca_file=stranger.ca_file)))


def test_a_broker_under_another_name_is_not_believed(table: Table, tmp_path: Path) -> None:
    """The proxy's certificate is of the right authority, for another host."""
    other = TlsProxy(int(table.stack.kafka_bootstrap_servers.rpartition(":")[2]), _elsewhere(tmp_path))
    other.start()
    try:
        for checked in (True, False):
            tls = {"ca_file": tmp_path / "ca.pem", "check_hostname": checked}
            changes = {"bootstrap_servers": f"127.0.0.1:{other.port}", "tls": tls, "request_timeout_seconds": 5}
            _reached(_administrator(table.stack, **changes))
            assert bool(other.connections) == (not checked)
    finally:
        other.stop()


def _elsewhere(folder: Path):  # type: ignore[no-untyped-def]
    authority = Authority(folder)
    authority.create()
    return authority.issue("elsewhere", server_names="subjectAltName=DNS:elsewhere.example")


def test_a_replaced_certificate_is_shown_without_a_restart(table: Table, tmp_path: Path) -> None:
    """One client's settings and context; the broker knows by the certificate who comes, and shows each its own topics."""

    def show(service: str) -> None:
        made = table.stack.authority.issue(principal(service))
        for file, name in ((made.certificate_file, "tls.crt"), (made.key_file, "tls.key")):
            shutil.copy(file, tmp_path / f".{name}")
            (tmp_path / f".{name}").rename(tmp_path / name)

    async def visible() -> set[str]:
        client = AIOKafkaAdminClient(**connection)
        await client.start()
        try:
            return {name.removeprefix(PREFIX) for name in await client.list_topics() if name.startswith(PREFIX)}
        finally:
            await client.close()

    show("validator")
    connection = _with_certificate(table.stack, certificate_file=tmp_path / "tls.crt", key_file=tmp_path / "tls.key").connection("one")
    before = asyncio.run(visible())
    show("retention")
    after = asyncio.run(visible())
    assert "validation.requested" in before - after
    assert "sweep.requested" in after - before


def test_a_service_with_a_wrong_password_says_why_it_waits(secured: SecuredStack, table: Table) -> None:
    process = ServiceProcess("tokenizer", secured, None, PREFIX, {"TESSERA__KAFKA__SASL_PASSWORD": "wrong", **PASSWORDS})
    process.start()
    try:
        eventually_blocking(lambda: "uthentication" in process.log.read_text(), PATIENCE_SECONDS)
        assert not process.answers()
    finally:
        process.stop()


PASSWORDS = {"TESSERA__POSTGRES__WORKER_PASSWORD": "unused", "TESSERA__POSTGRES__CLIENT_PASSWORD": "unused"}


def test_a_service_without_rights_waits_until_it_has_them(secured: SecuredStack) -> None:
    prefix = "later."
    kafka = _administrator(secured, topic_prefix=prefix)
    asyncio.run(ensure_all(kafka))
    process = ServiceProcess("validator", secured, None, prefix, PASSWORDS)
    process.start()
    try:
        eventually_blocking(lambda: "make_acls" in process.log.read_text(), PATIENCE_SECONDS)
        asyncio.run(apply(kafka, Request().grants(kafka)))
        eventually_blocking(lambda: "service started" in process.log.read_text(), PATIENCE_SECONDS)
    finally:
        process.stop()
