"""A real gateway process on real Kafka and Postgres. The other services are played by a peer that only speaks CloudEvents."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from openai import OpenAI

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts import uuid7
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import topic_of
from tessera.contracts.events import ModelDeclared, ModelReference
from tessera.gateway.domain import keys
from tessera.testkit import (
    PostgresDatabase,
    ServiceProcess,
    Stack,
    Wire,
    eventually_blocking,
    http_client,
    new_database,
    unique_kafka_prefix,
)
from tessera.testkit.issuer import LocalIssuer
from tessera.testkit.plugin import until_last_use

Script = Callable[["Heard"], list[EventData]]


@dataclass(frozen=True)
class Heard:
    """A request as the peer met it on the log."""

    attributes: dict[str, str]
    data: dict[str, Any]
    topic: str
    key: bytes | None


@dataclass
class Peer:
    """Reads the gateway's requests and answers as scripted. Nothing of the bus is used."""

    servers: str
    prefix: str
    heard: list[Heard] = field(default_factory=list)
    scripts: dict[str, Script] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._producer = Producer({"bootstrap.servers": self.servers, "linger.ms": 0})
        self._consumer = Consumer({"bootstrap.servers": self.servers, "group.id": "unused", "fetch.wait.max.ms": 20})
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, *topics: str) -> None:
        known = self._consumer.list_topics(timeout=10).topics
        named = [self.prefix + topic for topic in topics]
        self._consumer.assign([TopicPartition(name, number, 0) for name in named for number in known[name].partitions])
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)
        self._consumer.close()

    def on(self, request: type[EventData], script: Script) -> None:
        """From now on requests of this type are answered so."""
        self.scripts[request.event_type] = script

    def of(self, event: type[EventData]) -> list[Heard]:
        return [heard for heard in list(self.heard) if heard.attributes["type"] == event.event_type]

    def say(self, data: EventData, *, partition: int = -1, key: bytes | None = None, correlation: str | None = None) -> None:
        """Publish an event as a service would."""
        attributes = {"specversion": "1.0", "id": str(uuid7()), "source": "/test/peer", "type": data.event_type, "tenantid": "default"}
        attributes |= {"time": "2026-01-01T00:00:00Z", **({"correlationid": correlation} if correlation else {})}
        headers = [(f"ce_{name}", value.encode()) for name, value in attributes.items()]
        topic = self.prefix + topic_of(type(data)).name
        self._producer.produce(topic, data.model_dump_json(exclude_none=True).encode(), key, partition=partition, headers=headers)
        self._producer.flush(10)

    def _run(self) -> None:
        while not self._stopping.is_set():
            message = self._consumer.poll(0.05)
            if message is not None and message.error() is None:
                self._hear(message)

    def _hear(self, message: Any) -> None:
        headers = {name.removeprefix("ce_"): value.decode() for name, value in message.headers()}
        heard = Heard(headers, json.loads(message.value()), message.topic().removeprefix(self.prefix), message.key())
        self.heard.append(heard)
        script = self.scripts.get(headers["type"])
        for reply in script(heard) if script else []:
            self.say(reply, partition=heard.data["reply_partition"], correlation=headers["id"])


@dataclass(frozen=True)
class Gateway:
    """One running gateway and what tests need to talk to it."""

    process: ServiceProcess
    key: str
    peer: Peer
    database: PostgresDatabase
    settings: Path
    """Its TESSERA_SETTINGS_FILE; empty between tests."""
    issuer: LocalIssuer
    issuer_wire: Wire

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key or self.key}"}
        return http_client(base_url=self.process.url, headers=headers, timeout=30, **options)

    def openai(self, key: str | None = None, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.process.url}/v1", api_key=key or self.key, max_retries=0, **options)


MODELS = (
    ModelReference(model_id="local/quote", provider="local", capability="chat", encoding="o200k_base", template="openai-chat", exact=True),
    ModelReference(model_id="remote/chat", provider="openai", capability="chat", encoding="o200k_base", template="openai-chat", exact=True),
    ModelReference(model_id="local/ngram", provider="local", capability="completion", encoding="o200k_base", template="text", exact=True),
    ModelReference(model_id="local/minilm", provider="local", capability="embedding", encoding="minilm", template="text", exact=True),
)
REQUESTS = (
    "generation.requested",
    "generation.cancelled",
    "recall.requested",
    "embedding.requested",
    "tokenization.requested",
    "ingestion.inspected",
    "policy.requested",
    "sweep.requested",
    "validation.requested",
    "tenant.changed",
    "audit.recorded",
    "ingest.default",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    """All that use the gateway follow one another on one worker."""
    if "gateway" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.xdist_group("gateway"))


def _issuer(closing: ExitStack) -> tuple[LocalIssuer, Wire]:
    """An OpenID provider behind a wire."""
    issuer = closing.enter_context(LocalIssuer().running())
    wire = Wire(issuer.port)
    closing.callback(wire.cut)
    issuer.url = f"http://127.0.0.1:{wire.port}"
    return issuer, wire


@pytest.fixture(scope="session")
def gateway(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = tmp_path_factory.mktemp("gateway") / "settings.env"
    settings.touch()
    prefix = unique_kafka_prefix()
    database = new_database(stack, ["gateway"])
    kafka = KafkaSettings(bootstrap_servers=stack.kafka_bootstrap_servers, topic_prefix=prefix, keyed_partitions=4)
    asyncio.run(ensure_all(kafka, tenants=["default"]))
    key = keys.generate("test").reveal()
    closing = ExitStack()
    issuer, issuer_wire = _issuer(closing)
    environment = {
        "TESSERA_SETTINGS_FILE": str(settings),
        "TESSERA_GATEWAY__BOOTSTRAP_KEY": key,
        **issuer.settings(),
        "TESSERA_GATEWAY__OIDC__ROLES": '{"operator": ["admin"]}',
        "TESSERA_GATEWAY__OIDC__UNKNOWN_KEY_SECONDS": "0.2",
        "TESSERA_GATEWAY__OIDC__KEYS_RENEWED_SECONDS": "2",
        "TESSERA_GATEWAY__KEEP_ALIVE_SECONDS": "0.3",
        "TESSERA_GATEWAY__GENERATION_TIMEOUT_SECONDS": "5",
        "TESSERA_GATEWAY__QUESTION_TIMEOUT_SECONDS": "3",
        "TESSERA_GATEWAY__BODY_TIMEOUT_SECONDS": "2",
        "TESSERA_GATEWAY__MAXIMUM_UPLOAD_BYTES": "2000000",
        "TESSERA_GATEWAY__LAST_USED_SECONDS": "0.2",
        "TESSERA_GATEWAY__LIMITS__USER__REQUESTS_PER_MINUTE": "50",
        "TESSERA_GATEWAY__LIMITS__USER__TOKENS_PER_MINUTE": "1000",
        "TESSERA_GATEWAY__LIMITS__USER__CONCURRENT_STREAMS": "1",
    }
    process = ServiceProcess("gateway", stack, database, prefix, environment)
    peer = Peer(stack.kafka_bootstrap_servers, prefix)

    @cache
    def stop() -> None:
        peer.stop()
        process.stop()
        database.drop()
        closing.close()

    try:
        process.start()
        process.wait_ready()
        peer.start(*REQUESTS)
        for model in MODELS:
            peer.say(ModelDeclared(model=model, description=f"{model.model_id} for tests", owned_by="tests"), key=model.model_id.encode())
        running = Gateway(process, key, peer, database, settings, issuer, issuer_wire)
        with running.http() as client:
            eventually_blocking(lambda: len(client.get("/v1/models").json()["data"]) == len(MODELS))
        until_last_use("gateway", stop)
        yield running
    finally:
        stop()
