"""The process `tessera-tokenizer`; the only place that builds anything."""

from __future__ import annotations

import asyncio

from tessera.bus.service import Runtime, run_service
from tessera.encodings import ENCODING_NAMES, encoding
from tessera.tokenizer import consumers
from tessera.tokenizer.adapters.postgres import PostgresVocabulary
from tessera.tokenizer.handlers import Handlers
from tessera.tokenizer.settings import TokenizerSettings


def main() -> None:
    """Runs the service until it is told to stop."""
    run_service(TokenizerSettings, build)


async def build(runtime: Runtime[TokenizerSettings]) -> None:
    """Loads the encodings before the first event, so that no request pays for it, and registers the consumers."""
    await asyncio.gather(*(asyncio.to_thread(encoding, name) for name in ENCODING_NAMES))
    vocabulary = PostgresVocabulary(runtime.database)
    consumers.register(runtime.bus, Handlers(vocabulary, runtime.settings.memory_encoding))
