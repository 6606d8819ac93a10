"""Builds memory; the only place that does."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial

from tessera.bus import Received
from tessera.bus.service import Runtime, run_service
from tessera.bus.waiting import WaitingRoom
from tessera.contracts.events import TenantChanged
from tessera.memory import consumers
from tessera.memory.adapters.admission import PostgresUnit
from tessera.memory.adapters.announcements import Announcements
from tessera.memory.adapters.declaration import declared_once
from tessera.memory.adapters.indexing import PostgresIndexQueue
from tessera.memory.adapters.minilm import MiniLmEmbedder
from tessera.memory.adapters.questions import CachedQueryEmbedder, GuardedEmbedder, QueryCache
from tessera.memory.adapters.recall import PostgresMemoryStore
from tessera.memory.adapters.refusals import note_refusal
from tessera.memory.adapters.tenants import PostgresTenants
from tessera.memory.domain.chunking import chunks
from tessera.memory.handlers import EMBEDDER, Handlers
from tessera.memory.settings import MemorySettings
from tessera.memory.workers import IndexWorker, LexicalStage, VectorStage
from tessera.resilience import Breaker
from tessera.storage import redis_client


async def build(runtime: Runtime[MemorySettings]) -> None:
    """Registers dependencies, consumers and workers. Raises FatalError when the embedding model is not the pinned one."""
    embedder = await asyncio.to_thread(MiniLmEmbedder)
    await asyncio.to_thread(chunks, "The ranks are loaded now, not when the first document comes.")
    breaker = _embedder_breaker(runtime.settings)
    guarded = GuardedEmbedder(embedder, breaker)
    room = WaitingRoom()
    store, queries = PostgresMemoryStore(runtime.database), _queries(runtime, embedder, breaker)
    handlers = Handlers(_tenants(runtime), store, guarded, queries, runtime.bus.log_ends, room)
    runtime.add_dependency(EMBEDDER, required=False, check=embedder.check, breaker=breaker)
    runtime.on_close(embedder.close)
    consumers.register(runtime.bus, handlers, PostgresUnit)
    runtime.bus.consumer("ingestion").on_refused(note_refusal)
    _add_workers(runtime, guarded, room)
    runtime.add_worker("declaration", declared_once(runtime.bus))


def _tenants(runtime: Runtime[MemorySettings]) -> PostgresTenants:
    tenants = PostgresTenants(runtime.database)

    async def tenant_changed(event: Received[TenantChanged]) -> None:
        await tenants.put(event.data)

    tenants.follows(runtime.bus.table(TenantChanged, tenant_changed).up_to_date)
    return tenants


def _queries(runtime: Runtime[MemorySettings], embedder: MiniLmEmbedder, breaker: Breaker) -> CachedQueryEmbedder:
    queries = CachedQueryEmbedder(embedder, breaker, _cache(runtime), runtime.settings.embedder.query_timeout)
    runtime.on_reload(lambda fresh: partial(queries.wait_for, fresh.embedder.query_timeout))
    return queries


def _cache(runtime: Runtime[MemorySettings]) -> QueryCache | None:
    settings = runtime.settings.query_cache
    if not settings.enabled:
        return None
    redis = redis_client(runtime.settings.redis)
    breaker = Breaker(
        "redis", failure_threshold=settings.breaker_failure_threshold, reset_after=timedelta(seconds=settings.breaker_reset_seconds)
    )
    cache = QueryCache(redis, breaker, timedelta(seconds=settings.lifetime_seconds))
    runtime.add_dependency("redis", required=False, check=cache.check, breaker=breaker)
    runtime.on_close(redis.aclose)
    return cache


def _embedder_breaker(settings: MemorySettings) -> Breaker:
    embedder = settings.embedder
    return Breaker(
        EMBEDDER, failure_threshold=embedder.breaker_failure_threshold, reset_after=timedelta(seconds=embedder.breaker_reset_seconds)
    )


def _add_workers(runtime: Runtime[MemorySettings], embedder: GuardedEmbedder, room: WaitingRoom) -> None:
    queue, settings = PostgresIndexQueue(runtime.database), runtime.settings.indexing
    lexical = IndexWorker("lexical", queue, LexicalStage(), settings.lexical_batch, settings.poll)
    vector = IndexWorker("vector", queue, VectorStage(embedder), settings.vector_batch, settings.poll)
    runtime.add_worker("announcements", Announcements(runtime.database, lexical.announced, vector.announced, progressed=room.changed).run)
    runtime.add_worker("waiting", room.run)
    runtime.add_worker("lexical", lexical.run)
    runtime.add_worker("vector", vector.run)


def main() -> None:
    """Runs the service until it is told to stop."""
    run_service(MemorySettings, build)


if __name__ == "__main__":
    main()
