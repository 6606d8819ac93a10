"""From topic to handler."""

from __future__ import annotations

from tessera.bus import Bus, Emitter
from tessera.bus.events import Received
from tessera.contracts.events import GenerationRequested, MemoryRecorded, TokenizationRequested
from tessera.tokenizer.handlers import Handlers


def register(bus: Bus, handlers: Handlers) -> None:
    """Gives every event that the catalogue sends to the tokenizer its handler."""
    chat = bus.consumer("chat")
    ingestion = bus.consumer("ingestion")

    @chat.replying(GenerationRequested)
    async def generation_requested(event: Received[GenerationRequested], emit: Emitter) -> None:
        await handlers.count_prompt(event, emit)

    @chat.replying(TokenizationRequested)
    async def tokenization_requested(event: Received[TokenizationRequested], emit: Emitter) -> None:
        await handlers.tokenize(event, emit)

    @ingestion.idempotent(MemoryRecorded)
    async def memory_recorded(event: Received[MemoryRecorded], emit: Emitter) -> None:
        await handlers.learn(event, emit)
