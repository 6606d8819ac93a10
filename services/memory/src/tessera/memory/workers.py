"""Index work: the words of new memories at once, their vectors as soon as the embedder has made them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from tessera.contracts.errors import RetryableError
from tessera.memory.domain.terms import terms
from tessera.memory.ports import Embedder, Indexable, IndexQueue, Stage, Vector
from tessera.resilience import ResilienceError
from tessera.telemetry import get_logger

_log = get_logger(__name__)


class IndexStage(Protocol):
    """One stage of index work."""

    async def __call__(self, queue: IndexQueue, limit: int) -> int:
        """Does one batch of at most `limit` tasks and returns its size. Raises what makes the batch wait."""
        ...


class IndexWorker:
    """Runs one stage until told to stop. Several replicas share the work; a task whose worker died is taken over at once.

    Set `announced` when there is new work; what an announcement missed is found after `poll`.
    """

    def __init__(self, stage: Stage, queue: IndexQueue, work: IndexStage, batch_size: int, poll: timedelta) -> None:
        self.announced = asyncio.Event()
        self._stage = stage
        self._queue = queue
        self._work = work
        self._batch_size = batch_size
        self._poll = poll

    async def run(self, stopping: asyncio.Event) -> None:
        """Returns once `stopping` is set and the batch in hand is done."""
        while not stopping.is_set():
            self.announced.clear()
            if await self._one_batch() == 0:
                await _first_of(stopping, self.announced, self._poll)

    async def _one_batch(self) -> int:
        try:
            return await self._work(self._queue, self._batch_size)
        except (RetryableError, ResilienceError) as error:
            _log.warning("indexing waits", stage=self._stage, error=str(error))
            return 0


class LexicalStage:
    """Writes the lexical entries of what is due; needs nothing but Postgres."""

    async def __call__(self, queue: IndexQueue, limit: int) -> int:
        """See IndexStage."""
        async with queue.claim("lexical", limit) as batch:
            counts = await asyncio.to_thread(_counted, batch.items)
            if batch.items:
                await batch.write_terms(counts)
        return batch.claimed


class VectorStage:
    """Writes the vectors of what is due. Behind an open breaker the work waits in the queue and nothing is lost."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def __call__(self, queue: IndexQueue, limit: int) -> int:
        """See IndexStage."""
        async with queue.claim("vector", limit) as batch:
            if batch.items:
                vectors = await self._vectors(batch.items)
                await batch.write_vectors(vectors, self._embedder.model_id)
        return batch.claimed

    async def _vectors(self, items: Sequence[Indexable]) -> list[tuple[Vector, Vector]]:
        """Each text once: a memory without neighbours looks the same in both views."""
        texts = list(dict.fromkeys(text for item in items for text in (item.alone, item.context)))
        embedded = dict(zip(texts, await self._embedder.embed(texts), strict=True))
        return [(embedded[item.alone].vector, embedded[item.context].vector) for item in items]


def _counted(items: Sequence[Indexable]) -> list[tuple[Counter[int], Counter[int]]]:
    return [(terms(item.alone), terms(item.context)) for item in items]


async def _first_of(stopping: asyncio.Event, announced: asyncio.Event, limit: timedelta) -> None:
    waiting = {asyncio.create_task(event.wait()) for event in (stopping, announced)}
    await asyncio.wait(waiting, timeout=limit.total_seconds(), return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
