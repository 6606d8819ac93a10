"""Declares the embedding model, so that the gateway can list it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Final

from tessera.bus import Bus
from tessera.contracts.errors import RetryableError
from tessera.contracts.events import ModelDeclared, ModelReference
from tessera.memory.adapters.minilm import MAX_TOKENS, MODEL_ID
from tessera.resilience import RetryPolicy, retrying

PLATFORM: Final = "platform"
"""The tenant of events that belong to no tenant."""
_PATIENCE: Final = RetryPolicy(attempts=None, initial=timedelta(milliseconds=200), maximum=timedelta(seconds=5))

DECLARATION: Final = ModelDeclared(
    model=ModelReference(
        model_id=MODEL_ID,
        provider="memory",
        capability="embedding",
        encoding="wordpiece",
        template="text",
        exact=True,
        context_tokens=MAX_TOKENS,
    ),
    description="Sentence embeddings of 384 dimensions, unit length, English first; texts beyond 256 tokens are cut.",
    owned_by="sentence-transformers",
)


def declared_once(bus: Bus) -> Callable[[asyncio.Event], Coroutine[Any, Any, None]]:
    """A worker that declares the model when the service has started, and then rests."""

    async def declare(stopping: asyncio.Event) -> None:
        await retrying(_PATIENCE, RetryableError)(bus.publish, DECLARATION, tenant_id=PLATFORM, key=MODEL_ID.encode())
        await stopping.wait()

    return declare
