"""From topics to handlers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from tessera.bus import Bus, Received, Transaction
from tessera.contracts import GenerationCancelled, GenerationReady, TextTokenized
from tessera.generator import handlers
from tessera.generator.domain.models import ModelCatalogue
from tessera.generator.ports import IntakeOf, LearnerOf


@dataclass(frozen=True)
class Surroundings:
    """What the handlers are given besides the event."""

    models: ModelCatalogue
    time_limit: timedelta
    encoding: str
    intake: IntakeOf
    learner: LearnerOf


def register(bus: Bus, around: Surroundings) -> None:
    """Registers every consumer of the generator."""
    chat = bus.consumer("chat")
    ingestion = bus.consumer("ingestion")

    @chat.transactional(GenerationReady)
    async def generation_ready(event: Received[GenerationReady], transaction: Transaction) -> None:
        await handlers.generation_ready(event, around.intake(transaction), around.models, around.time_limit)

    @chat.transactional(GenerationCancelled)
    async def generation_cancelled(event: Received[GenerationCancelled], transaction: Transaction) -> None:
        await handlers.generation_cancelled(event, around.intake(transaction))

    @ingestion.transactional(TextTokenized)
    async def text_tokenized(event: Received[TextTokenized], transaction: Transaction) -> None:
        await handlers.text_tokenized(event, around.learner(transaction), around.encoding)
