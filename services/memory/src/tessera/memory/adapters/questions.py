"""The embedder behind its breaker, and vectors of recent questions in Redis: losing those costs time and nothing else."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from datetime import timedelta

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tessera.contracts.errors import RetryableError
from tessera.memory.ports import Embedded, Embedder, Vector
from tessera.resilience import Breaker, CircuitOpenError, deadline
from tessera.telemetry import get_logger

_log = get_logger(__name__)


class QueryCache:
    """A cache of vectors that answers nothing instead of failing.

    Keys are hashes of (tenant, model, question): no text is kept, and no tenant can learn from timing what another one asked.
    """

    def __init__(self, redis: Redis, breaker: Breaker, lifetime: timedelta) -> None:
        self._redis = redis
        self._breaker = breaker
        self._lifetime = lifetime

    async def check(self) -> None:
        """Raises RedisError or OSError when Redis does not answer."""
        await self._redis.ping()

    async def get(self, key: str) -> Vector | None:
        """The vector kept under `key`; None where there is none or Redis cannot be asked."""
        try:
            found: bytes | None = await self._breaker.call(self._redis.get, key)  # type: ignore[arg-type]
        except (RedisError, OSError, CircuitOpenError):
            return None
        return struct.unpack(f"<{len(found) // 4}f", found) if found else None

    async def put(self, key: str, vector: Vector) -> None:
        """Keeps the vector for a while, if Redis can be reached."""
        try:
            await self._breaker.call(self._redis.set, key, struct.pack(f"<{len(vector)}f", *vector), ex=self._lifetime)
        except (RedisError, OSError, CircuitOpenError):
            return


class CachedQueryEmbedder:
    """`QueryEmbedder` in front of an embedder, its breaker and an optional cache."""

    def __init__(self, embedder: Embedder, breaker: Breaker, cache: QueryCache | None, timeout: timedelta) -> None:
        self._embedder = embedder
        self._breaker = breaker
        self._cache = cache
        self._timeout = timeout

    def wait_for(self, timeout: timedelta) -> None:
        """Is as patient with the next question."""
        self._timeout = timeout

    async def vector(self, tenant_id: str, query: str) -> Vector | None:
        """See QueryEmbedder."""
        if self._cache is None:
            return await self._embedded(query)
        key = cache_key(tenant_id, self._embedder.model_id, query)
        cached = await self._cache.get(key)
        if cached is not None:
            return cached
        vector = await self._embedded(query)
        if vector is not None:
            await self._cache.put(key, vector)
        return vector

    async def _embedded(self, query: str) -> Vector | None:
        try:
            async with self._breaker.guard(), deadline(self._timeout.total_seconds()):
                return (await self._embedder.embed([query]))[0].vector
        except (CircuitOpenError, TimeoutError, RetryableError) as error:
            _log.warning("question not embedded", error=str(error))
            return None


class GuardedEmbedder:
    """An embedder behind its breaker. Raises CircuitOpenError while that is open."""

    def __init__(self, embedder: Embedder, breaker: Breaker) -> None:
        self._embedder = embedder
        self._breaker = breaker

    @property
    def model_id(self) -> str:
        """See Embedder."""
        return self._embedder.model_id

    async def embed(self, texts: Sequence[str]) -> list[Embedded]:
        """See Embedder."""
        return await self._breaker.call(self._embedder.embed, texts)


def cache_key(tenant_id: str, model_id: str, query: str) -> str:
    """Where the vector of a tenant's question is kept."""
    digest = hashlib.sha256("\x00".join((tenant_id, model_id, query)).encode()).hexdigest()
    return f"tessera:memory:query:{digest}"
