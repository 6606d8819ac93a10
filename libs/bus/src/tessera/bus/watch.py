"""Notices a consumer that is alive but stuck, and has it join its group anew (docs/breakers.md).

Kafka's client has states that it does not leave by itself: a heartbeat or coordination task that ended with an error, an assignment that
never comes, a fetch that never returns. Seen from outside they are one: Kafka answers, and the consumer's polls do not come back, fail, or
bring nothing although there is something.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Final, TypeVar

from aiokafka import TopicPartition

from tessera.bus.broker import PatientConsumer
from tessera.bus.partitions import BACKOFF, PASSING
from tessera.bus.publisher import as_retryable
from tessera.contracts.errors import RetryableError
from tessera.resilience import retrying
from tessera.telemetry import get_logger, metrics

LOOK_EVERY: Final = timedelta(seconds=5)
_ANSWER_WITHIN: Final = timedelta(seconds=5)
_END_WITHIN: Final = timedelta(seconds=2)
_GIVEN_UP_AFTER: Final = 3
"""Rejoins in a row without effect, before the process is told to be stuck."""

T = TypeVar("T")

_log = get_logger(__name__)


class Watch:
    """Looks at one consumer every few seconds. `consumer` gives the present one; `rejoin` replaces it.

    `patience` is how long a consumer may look stuck while Kafka answers; it must exceed the longest rebalance. While `busy`, whoever polls
    has something else to do.
    """

    def __init__(
        self,
        group: str,
        *,
        consumer: Callable[[], PatientConsumer],
        kafka_answers: Callable[[], Coroutine[Any, Any, None]],
        rejoin: Callable[[], Coroutine[Any, Any, None]],
        patience: timedelta,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._group = group
        self._consumer = consumer
        self._kafka_answers = kafka_answers
        self._rejoin = rejoin
        self._patience = patience
        self._busy = busy
        self._well_at = time.monotonic()
        self._behind: dict[TopicPartition, int] = {}
        self._rejoins = 0
        self._looking: asyncio.Task[None] | None = None
        self._open: dict[str, asyncio.Task[Any]] = {}
        """Questions by whom they were put to."""

    def start(self) -> None:
        """Begins to look."""
        self._looking = asyncio.create_task(self._run(), name=f"{self._group}:watch")

    async def stop(self) -> None:
        """Looks no more. Call it before the consumer is stopped."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._open:
            await asyncio.wait(self._open.values(), timeout=_END_WITHIN.total_seconds())
        for question in self._open.values():
            question.cancel()
        await asyncio.gather(*self._open.values(), return_exceptions=True)

    async def _run(self) -> None:
        """No failure of one look ends it."""
        while True:
            await asyncio.sleep(LOOK_EVERY.total_seconds())
            try:
                await self._look()
            except Exception:  # noqa: BLE001
                # Whoever watches must not be the one that stops: the next look may succeed.
                _log.exception("looking after a consumer failed", consumer=self._group)

    def check_live(self) -> None:
        """Raises RetryableError when joining anew did not help, again and again: only a new process may."""
        if self._rejoins >= _GIVEN_UP_AFTER:
            raise RetryableError(f"{self._group} joined anew {self._rejoins} times and still does not consume", code="consumer_stuck")

    async def _look(self) -> None:
        if self._busy() or not await self._answers():
            self._well_at = time.monotonic()  # nothing can be said about the consumer
            return
        turned_at = await self._turned_and_moved_at()
        if turned_at > self._well_at:
            self._well_at, self._rejoins = turned_at, 0
        elif time.monotonic() - self._well_at > self._patience.total_seconds():
            await self._join_anew()

    async def _answers(self) -> bool:
        try:
            await self._answered("Kafka", self._kafka_answers())
        except PASSING:
            return False
        return True

    async def _answered(self, whom: str, question: Coroutine[Any, Any, T]) -> T:
        """The answer, if it comes soon. Raises RetryableError when not.

        The question goes on then, and the same one is not asked anew before it has ended: cancelled while it connects, the client
        leaks a connection.
        """
        if whom in self._open and not self._open[whom].done():
            question.close()
            raise RetryableError(f"{whom} has not answered an earlier question yet.", code="broker_unavailable")
        self._open[whom] = asked = asyncio.create_task(question)
        await asyncio.wait({asked}, timeout=_ANSWER_WITHIN.total_seconds())
        if not asked.done():
            asked.add_done_callback(_heard)
            raise RetryableError(f"{whom} does not answer in time.", code="broker_unavailable")
        return asked.result()

    async def _turned_and_moved_at(self) -> float:
        """When a poll last came back, unless a partition that is behind stands where it stood at the last look.

        Where the log's ends cannot be told (a partition without a leader), a consumer that polls is given the benefit of the doubt.
        """
        try:
            consumer = self._consumer()
        except RetryableError:
            return float("-inf")
        try:
            behind = await self._answered("consumer", _fetched_to(consumer))
        except PASSING:
            return consumer.turned_at
        stands = any(self._behind.get(partition) == position for partition, position in behind.items())
        self._behind = behind
        return float("-inf") if stands else consumer.turned_at

    async def _join_anew(self) -> None:
        self._rejoins += 1
        metrics.BUS_REJOINS.labels(consumer=self._group).inc()
        _log.error("alive but stuck: joining the group anew", consumer=self._group, rejoins=self._rejoins)
        await retrying(BACKOFF, PASSING)(self._rejoin)
        self._open.pop("consumer", None)  # put to the former one, with whose client it ends
        self._well_at, self._behind = time.monotonic(), {}


def _heard(late: asyncio.Task[Any]) -> None:
    """An answer that nobody waits for any more is heard all the same, or asyncio would complain."""
    if not late.cancelled():
        late.exception()


async def _fetched_to(consumer: PatientConsumer) -> dict[TopicPartition, int]:
    """The place up to which each partition that is behind the log's end was fetched; without those that are held back on purpose."""
    fetching = sorted(consumer.assignment() - consumer.paused())
    if not fetching:
        return {}
    with as_retryable():
        ends = await consumer.end_offsets(fetching)
        places = {partition: int(await consumer.position(partition)) for partition in fetching}
    return {partition: place for partition, place in places.items() if place < ends[partition]}
