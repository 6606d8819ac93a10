"""Events, questions and streams over the bus."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta

from tessera import resilience
from tessera.bus import Bus, Outgoing, Position, Received, Reply, faults
from tessera.bus.codec import Encoded
from tessera.bus.errors import RequestFailedError
from tessera.contracts.base import EventData, RequestData
from tessera.contracts.catalogue import ingestion_topic
from tessera.contracts.errors import InvalidError, Problem, RetryableError
from tessera.contracts.events import GenerationChunk, GenerationCompleted, GenerationFailed, GenerationRequested, RequestFailed
from tessera.gateway.domain import errors
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.errors import ApiError, of_problem
from tessera.gateway.domain.records import Since
from tessera.gateway.domain.spool import AcceptedEvent
from tessera.gateway.ports import Call, Published
from tessera.resilience import Breaker, CircuitOpenError, TimedOutError
from tessera.telemetry import span

ACCEPTED_BEFORE_PUBLISH = "accepted_before_publish"
"""Crash point: the event is nowhere, and the client does not know."""
PUBLISHED_BEFORE_ANSWER = "published_before_answer"
"""Crash point: the event is in the log and the client does not know."""


class BusLog:
    """Implements `ports.Log`.

    Kafka's client would hold an event back until a broker is there again. A client of ours is told after `patience` instead; then it is
    not known whether the event will arrive, and the answer says so. After some of these the breaker answers at once.
    """

    def __init__(self, bus: Bus, patience: timedelta) -> None:
        self.breaker = Breaker("publishing", failures=(TimedOutError, RetryableError))
        self._patience = patience
        self._bus = bus
        self._requests = bus.requests

    @property
    def reply_partition(self) -> int:
        """The reply partition that this process reads."""
        return self._requests.reply_partition

    async def publish(
        self,
        data: EventData,
        call: Call,
        *,
        event_id: str | None = None,
        key: bytes | None = None,
        subject_id: str | None = None,
        deadline: datetime | None = None,
    ) -> Published:
        """Where the catalogue says. What is ingested goes by `accepted` and `send`."""
        faults.reach(ACCEPTED_BEFORE_PUBLISH)
        with told(doubt=True):
            async with self.breaker.guard(), resilience.deadline(self._patience):
                position = await self._bus.publish(
                    data,
                    tenant_id=call.tenant_id,
                    id=event_id,
                    key=key,
                    subject_id=subject_id,
                    request_id=call.request_id,
                    deadline=deadline,
                )
        faults.reach(PUBLISHED_BEFORE_ANSWER)
        return Published(event_id or "", position.topic, position.partition, position.offset)

    def accepted(self, data: EventData, call: Call, *, event_id: str, key: bytes, subject_id: str | None = None) -> AcceptedEvent:
        """For the tenant's own ingestion topic."""
        with told():
            record = self._bus.prepared(
                data,
                tenant_id=call.tenant_id,
                id=event_id,
                key=key,
                subject_id=subject_id,
                request_id=call.request_id,
                topic=ingestion_topic(call.tenant_id),
            )
        headers = tuple(record.encoded.headers)
        return AcceptedEvent(event_id, call.tenant_id, record.topic, key, headers, record.encoded.value, datetime.now(UTC))

    async def send(self, event: AcceptedEvent) -> Position:
        """Under the same breaker and time-out as everything else that is published."""
        faults.reach(ACCEPTED_BEFORE_PUBLISH)
        record = Outgoing(event.topic, Encoded(list(event.headers), event.value), event.key)
        with told(doubt=True), span(f"publish {event.event_type}"):
            async with self.breaker.guard(), resilience.deadline(self._patience):
                place = await self._bus.send(record)
        faults.reach(PUBLISHED_BEFORE_ANSWER)
        return place

    @property
    def openings(self) -> int | None:
        """As the breaker has it."""
        return {"open": 0, "half_open": 1}.get(self.breaker.state)

    async def ask(self, data: RequestData, call: Call, *, key: bytes | None = None) -> EventData:
        """The answer, or the problem as an ApiError."""
        with told():
            return await self._requests.ask(data, tenant_id=call.tenant_id, request_id=call.request_id, timeout=call.patience, key=key)

    async def requested(self, tenant_id: str, generation_id: str, at: datetime) -> Received[GenerationRequested] | None:
        """By the id that it was published with."""
        with told():
            return await self._bus.lookup.find(
                GenerationRequested, tenant_id=tenant_id, event_id=generation_id, key=generation_id.encode(), written_at=at
            )

    async def next_offset(self, partition: int) -> int:
        """A place before every reply to what is published from now on."""
        with told():
            return await self._requests.next_offset(partition)

    @asynccontextmanager
    async def stream(self, generation_id: str, *, since: Since | None = None) -> AsyncIterator[AsyncIterator[Located]]:
        """A failed request of another service ends the generation like a failure of the engine."""
        after = None if since is None else (since.partition, since.offset - 1)
        async with AsyncExitStack() as stack:
            with told():
                replies = await stack.enter_async_context(self._requests.stream(generation_id, after=after))
            yield _located(replies, generation_id)


async def _located(replies: AsyncIterator[Reply[EventData]], generation_id: str) -> AsyncIterator[Located]:
    try:
        async for reply in replies:
            data = reply.data
            if isinstance(data, RequestFailed):
                data = GenerationFailed(generation_id=generation_id, problem=data.problem)
            if isinstance(data, GenerationChunk | GenerationCompleted | GenerationFailed):
                yield Located(data, reply.partition, reply.offset)
    except RetryableError as error:
        raise ApiError(503, error.code, error.message, retry_after=errors.RETRY_LATER) from error


@contextmanager
def told(*, doubt: bool = False) -> Iterator[None]:
    """The bus's errors as answers; `doubt` where a time-out leaves open whether something will happen."""
    try:
        yield
    except RequestFailedError as error:
        raise of_problem(error.problem, default_status=400) from error
    except TimedOutError as error:
        raise (errors.in_doubt() if doubt else errors.timed_out("The service that answers this")) from error
    except (RetryableError, CircuitOpenError) as error:
        raise errors.unavailable("The event log") from error
    except InvalidError as error:
        raise of_problem(Problem.of(error), default_status=400) from error
