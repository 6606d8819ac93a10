"""From topic to handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tessera.bus import Bus, Emitter, Received, Transaction
from tessera.contracts.events import (
    ArchiveRequested,
    DocumentPublished,
    EmbeddingRequested,
    EntityPublished,
    FreshnessInspected,
    GenerationTokenized,
    IngestionInspected,
    MessagePublished,
    RecallRequested,
    RelationPublished,
)
from tessera.memory.handlers import Handlers
from tessera.memory.ports import AdmissionUnit, ArchiveUnit


class Unit(AdmissionUnit, ArchiveUnit, Protocol):
    """What a transaction becomes for the handlers."""


UnitOf = Callable[[Transaction], Unit]


def register(bus: Bus, handlers: Handlers, unit_of: UnitOf) -> None:
    """Registers every consumer of this service."""
    _ingestion(bus, handlers, unit_of)
    _bulk(bus, handlers, unit_of)
    _chat(bus, handlers)


def _ingestion(bus: Bus, handlers: Handlers, unit_of: UnitOf) -> None:
    ingestion = bus.consumer("ingestion")

    @ingestion.transactional(MessagePublished)
    async def message_published(event: Received[MessagePublished], transaction: Transaction) -> None:
        await handlers.message_published(event, unit_of(transaction))

    @ingestion.transactional(DocumentPublished)
    async def document_published(event: Received[DocumentPublished], transaction: Transaction) -> None:
        await handlers.document_published(event, unit_of(transaction))

    @ingestion.transactional(EntityPublished)
    async def entity_published(event: Received[EntityPublished], transaction: Transaction) -> None:
        await handlers.entity_published(event, unit_of(transaction))

    @ingestion.transactional(RelationPublished)
    async def relation_published(event: Received[RelationPublished], transaction: Transaction) -> None:
        await handlers.relation_published(event, unit_of(transaction))


def _bulk(bus: Bus, handlers: Handlers, unit_of: UnitOf) -> None:
    bulk = bus.consumer("bulk")

    @bulk.transactional(ArchiveRequested)
    async def archive_requested(event: Received[ArchiveRequested], transaction: Transaction) -> None:
        await handlers.archive_requested(event, unit_of(transaction))


def _chat(bus: Bus, handlers: Handlers) -> None:
    chat = bus.consumer("chat")

    @chat.replying(RecallRequested)
    async def recall_requested(event: Received[RecallRequested], emit: Emitter) -> None:
        await handlers.recall_requested(event, emit)

    @chat.replying(GenerationTokenized)
    async def generation_tokenized(event: Received[GenerationTokenized], emit: Emitter) -> None:
        await handlers.generation_tokenized(event, emit)

    @chat.replying(EmbeddingRequested)
    async def embedding_requested(event: Received[EmbeddingRequested], emit: Emitter) -> None:
        await handlers.embedding_requested(event, emit)

    @chat.replying(IngestionInspected)
    async def ingestion_inspected(event: Received[IngestionInspected], emit: Emitter) -> None:
        await handlers.ingestion_inspected(event, emit)

    @chat.replying(FreshnessInspected)
    async def freshness_inspected(event: Received[FreshnessInspected], emit: Emitter) -> None:
        await handlers.freshness_inspected(event, emit)
