"""Who may do what on the cluster, from the catalogue and from nothing else. `docs/transport-security.md` has the table."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Final

from tessera.bus.codec import is_tenant_id
from tessera.bus.deadletters import dead_letter_topics
from tessera.bus.settings import KafkaSettings
from tessera.contracts.catalogue import TOPICS, Mode, Topic, consumer_group, dead_letter_topic, ingestion_topic, refusal_topic
from tessera.contracts.errors import InvalidError

TENANT_MAKERS: Final = TOPICS["tenant.changed"].producers
"""Who makes the topics of new tenants."""
OPERATED_THROUGH: Final = TOPICS["service.control"].producers
"""Through whom operators act: who reads dead letters, and publishes again what is replayed."""


class Resource(StrEnum):
    """What a grant is about."""

    TOPIC = "topic"
    GROUP = "group"


class Pattern(StrEnum):
    """How a grant names it."""

    LITERAL = "literal"
    PREFIXED = "prefixed"


class Operation(StrEnum):
    """What is done to it. READ and WRITE include DESCRIBE."""

    READ = "Read"
    WRITE = "Write"
    CREATE = "Create"
    DESCRIBE = "Describe"


@dataclass(frozen=True, slots=True, order=True)
class Grant:
    """One line of an access control list. A denial outweighs every allowance."""

    principal: str
    """As the broker knows it, such as `User:tessera-memory`."""
    resource: Resource
    pattern: Pattern
    name: str
    """On the cluster, with the operator's prefix."""
    operation: Operation
    allowed: bool = True


@dataclass(frozen=True, slots=True)
class Right:
    """A grant before it has a principal; the name is the catalogue's."""

    operation: Operation
    name: str
    resource: Resource = Resource.TOPIC
    pattern: Pattern = Pattern.LITERAL
    allowed: bool = True

    def granted(self, principal: str, kafka: KafkaSettings) -> Grant:
        """The line for one principal on one cluster."""
        return Grant(principal, self.resource, self.pattern, kafka.physical(self.name), self.operation, self.allowed)


def service_rights(service: str) -> list[Right]:
    """What a service needs: nothing that the catalogue does not say."""
    tenants = _of_tenant_maker() if service in TENANT_MAKERS else ()
    tools = _of_dead_letters() if service in OPERATED_THROUGH else ()
    return [*_from_topics(service), *_from_groups(service), *tenants, *tools]


def tenant_rights(tenant_id: str) -> list[Right]:
    """What the producers of one tenant need. Raises InvalidError `tenant_invalid` for what is no tenant's id."""
    if not is_tenant_id(tenant_id):
        raise InvalidError("tenant_invalid", f"{tenant_id!r} is not a tenant's id.")
    told = refusal_topic(tenant_id)
    return [Right(Operation.WRITE, ingestion_topic(tenant_id)), Right(Operation.READ, told), Right(Operation.READ, told, Resource.GROUP)]


def shared_producers_rights() -> list[Right]:
    """What the operator's own producers need on the shared topic, where they are believed for every tenant."""
    told = refusal_topic(None)
    return [
        Right(Operation.WRITE, TOPICS["ingest"].name),
        Right(Operation.READ, told),
        _prefixed(Operation.READ, f"{told}."),
        Right(Operation.READ, told, Resource.GROUP, Pattern.PREFIXED),
    ]


def _from_topics(service: str) -> Iterator[Right]:
    for topic in TOPICS.values():
        consumer = topic.consumer(service)
        if consumer is not None:
            yield from _all_of(topic, Operation.READ)
            if consumer.mode is not Mode.BROADCAST:
                yield Right(Operation.WRITE, dead_letter_topic(topic.name, service))
            for retry in topic.retry_topics(service):
                yield Right(Operation.READ, retry.name)
                yield Right(Operation.WRITE, retry.name)
        if service in topic.producers:
            yield from _all_of(topic, Operation.WRITE, but_own=service)


def _all_of(topic: Topic, operation: Operation, but_own: str = "") -> Iterator[Right]:
    """The topic, those of its tenants, and a denial for what only begins like one of those."""
    yield Right(operation, topic.name)
    if not topic.per_tenant:
        return
    yield _prefixed(operation, f"{topic.name}.")
    for consumer in topic.consumers:
        if consumer.mode is not Mode.BROADCAST and consumer.service != but_own:
            yield Right(operation, dead_letter_topic(topic.name, consumer.service), allowed=False)


def _from_groups(service: str) -> Iterator[Right]:
    consumers = [topic.consumer(service) for topic in TOPICS.values()]
    classes = {consumer.traffic_class for consumer in consumers if consumer is not None and consumer.mode is not Mode.BROADCAST}
    return (Right(Operation.READ, consumer_group(service, traffic_class), Resource.GROUP) for traffic_class in sorted(classes))


def _of_tenant_maker() -> Iterator[Right]:
    for topic in TOPICS.values():
        if topic.per_tenant:
            yield _prefixed(Operation.CREATE, f"{topic.name}.")
            yield _prefixed(Operation.DESCRIBE, f"{topic.name}.")


def _of_dead_letters() -> Iterator[Right]:
    for letters, (topic, _) in dead_letter_topics().items():
        yield Right(Operation.READ, letters)
        yield from _all_of(TOPICS[topic], Operation.WRITE)


def _prefixed(operation: Operation, name: str) -> Right:
    return Right(operation, name, pattern=Pattern.PREFIXED)


def command_lines(grants: Iterable[Grant], bootstrap_servers: str) -> list[str]:
    """The same for `kafka-acls.sh`, one line per principal, kind of resource, pattern and operation; safe to paste into a shell."""
    return [_line(list(similar), bootstrap_servers) for _, similar in groupby(sorted(set(grants), key=_kind), key=_kind)]


def _kind(grant: Grant) -> tuple[str, bool, Resource, Pattern, Operation]:
    return grant.principal, grant.allowed, grant.resource, grant.pattern, grant.operation


def _line(grants: list[Grant], bootstrap_servers: str) -> str:
    one = grants[0]
    words = ["kafka-acls.sh", "--bootstrap-server", bootstrap_servers, "--command-config", "administrator.properties", "--add"]
    words += ["--allow-principal" if one.allowed else "--deny-principal", one.principal, "--operation", one.operation]
    words += ["--resource-pattern-type", one.pattern]
    words += [word for name in sorted(grant.name for grant in grants) for word in (f"--{one.resource}", name)]
    return shlex.join(words)
