"""Fakes, clocks and the stack for tests; never imported outside tests."""

from tessera.testkit.databases import PostgresDatabase, new_database
from tessera.testkit.events import CloudEvent, CloudEventProducer, CloudEventReader, Written, create_topics, unique_kafka_prefix
from tessera.testkit.http import http_client, http_request
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack
from tessera.testkit.waiting import eventually, eventually_blocking
from tessera.testkit.wire import Wire

__all__ = [
    "CloudEvent",
    "CloudEventProducer",
    "CloudEventReader",
    "PostgresDatabase",
    "ServiceProcess",
    "Stack",
    "Wire",
    "Written",
    "create_topics",
    "eventually",
    "eventually_blocking",
    "http_client",
    "http_request",
    "new_database",
    "unique_kafka_prefix",
]
