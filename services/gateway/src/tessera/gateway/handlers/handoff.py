"""Ingested events on their way to Kafka: straight, or over the spool while Kafka does not take them (docs/hand-off.md)."""

import asyncio
import time
from collections.abc import Awaitable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from tessera.bus import Position
from tessera.contracts.errors import RetryableError
from tessera.gateway.domain import errors
from tessera.gateway.domain.backlog import Backlog, Waiting, waiting_at
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.spool import AcceptedEvent
from tessera.gateway.ports import Log, SpoolStore
from tessera.telemetry import get_logger, metrics

WINDOW: Final = 64
"""Most events on their way out of the spool at once, each of another key."""
PAUSE: Final = timedelta(seconds=1)
"""How long a key rests after a failure, and how often a waiting drain looks up."""
LOOK_EVERY: Final = timedelta(seconds=5)
"""How often segments that nobody holds are looked for, and metrics brought up to date."""

Replayed = Literal["published", "waiting", "not_found"]

_log = get_logger(__name__)


@dataclass(frozen=True)
class HandedOver:
    """An event that will not be lost: it is in Kafka at `place`, or in the spool."""

    place: Position | None = None

    @property
    def status(self) -> Literal["accepted", "spooled"]:
        """The word for it."""
        return "spooled" if self.place is None else "accepted"


@dataclass(frozen=True)
class SpoolState:
    """What an operator sees of the spool."""

    enabled: bool
    records: int
    size_bytes: int
    oldest: datetime | None
    full: bool


class Handoff:
    """Takes accepted events. Without a store, what Kafka does not take is refused. One per process, for one event loop."""

    def __init__(self, log: Log, store: SpoolStore | None = None, *, ttl: timedelta = timedelta(days=1)) -> None:
        self._log = log
        self._store = store
        self._ttl = ttl
        self._backlog = Backlog()
        self._work = asyncio.Event()
        self._settled = asyncio.Condition()
        self._keeping: set[asyncio.Task[None]] = set()

    # --- taking ---
    async def hand_over(self, event: AcceptedEvent) -> HandedOver:
        """Returns when the event is in Kafka, or durable in the spool. Raises ApiError 503 when it is in neither.

        While the spool holds anything of the event's key, the event goes behind it.
        """
        if self._store is None:
            return HandedOver(await self._log.send(event))
        refusal = errors.unavailable("The event log")
        if not self._backlog.holds(event.key):
            try:
                return HandedOver(await self._log.send(event))
            except ApiError as error:
                if error.code != refusal.code:
                    raise
                refusal = error
        await self._kept(self._store, event, refusal)
        return HandedOver()

    async def _kept(self, store: SpoolStore, event: AcceptedEvent, refusal: ApiError) -> None:
        """Keeps the event also when the caller leaves meanwhile: what is on disk must be known here."""
        keeping = asyncio.create_task(self._keep(store, event))
        self._keeping.add(keeping)
        keeping.add_done_callback(self._kept_or_not)
        try:
            await asyncio.shield(keeping)
        except RetryableError as error:
            raise refusal from error

    def _kept_or_not(self, keeping: asyncio.Task[None]) -> None:
        self._keeping.discard(keeping)
        if not keeping.cancelled():
            keeping.exception()  # told to the caller, unless it has left

    async def _keep(self, store: SpoolStore, event: AcceptedEvent) -> None:
        self._backlog.add(waiting_at(await store.append(event), event))
        self._work.set()

    async def adopt(self) -> None:
        """Takes over what dead processes left. Raises OSError where the folder cannot be read."""
        if self._store is None:
            return
        for waiting in await self._store.adopt():
            self._backlog.add(waiting)
        self._work.set()

    # --- handing over ---
    async def drain(self, stopping: asyncio.Event) -> None:
        """Sends what waits, until told to stop; then what is on its way may still arrive."""
        sending: set[asyncio.Task[None]] = set()
        look_at = time.monotonic()
        try:
            while self._store is not None and not stopping.is_set():
                if time.monotonic() >= look_at:
                    await self._look_around()
                    look_at = time.monotonic() + LOOK_EVERY.total_seconds()
                self._work.clear()
                for waiting in self._backlog.take(self._room(len(sending)), time.monotonic()):
                    sending.add(asyncio.create_task(self._send(self._store, waiting)))
                sending -= await _first_of(sending, self._work.wait(), stopping.wait())
        finally:
            await asyncio.gather(*sending, return_exceptions=True)

    def _room(self, sending: int) -> int:
        openings = self._log.openings
        return max(0, (WINDOW if openings is None else min(WINDOW, openings)) - sending)

    async def _look_around(self) -> None:
        try:
            await self.adopt()
            self.measure()
        except OSError as error:
            _log.warning("the folder of the spool cannot be read", error=repr(error))

    async def _send(self, store: SpoolStore, waiting: Waiting) -> None:
        """One attempt. Whatever happens, the key is free for the next one afterwards."""
        try:
            outcome = await self._attempt(store, waiting)
        except (ApiError, OSError) as error:
            _log.info("a spooled event waits on", event_id=waiting.event_id, error=str(error), attempts=waiting.attempts + 1)
            self._failed(waiting, error)
        except Exception as error:  # noqa: BLE001
            # This is the only way out of the spool: whatever happens, it goes on, and says so.
            _log.exception("a spooled event could not be handed over", event_id=waiting.event_id)
            self._failed(waiting, error)
        else:
            await self._settle(store, waiting, outcome)
        async with self._settled:
            self._settled.notify_all()

    def _failed(self, waiting: Waiting, error: Exception) -> None:
        self._backlog.failed(waiting, str(error), time.monotonic() + PAUSE.total_seconds())

    async def _attempt(self, store: SpoolStore, waiting: Waiting) -> str:
        try:
            event = await store.read(waiting.place)
        except ValueError as error:
            _log.error("a spooled event can no longer be read and is set aside", event_id=waiting.event_id, error=str(error))
            return "damaged"
        late = datetime.now(UTC) - event.accepted_at > self._ttl
        try:
            await self._log.send(event.expired(self._ttl) if late else event)
        except ApiError as error:
            if error.status >= 500:
                raise
            _log.error("Kafka can never take a spooled event, which is set aside", event_id=waiting.event_id, error=error.message)
            return "damaged"
        return "expired" if late else "published"

    async def _settle(self, store: SpoolStore, waiting: Waiting, outcome: str) -> None:
        if outcome == "expired":
            _log.warning("a spooled event waited too long; it will be refused", event_id=waiting.event_id, tenant_id=waiting.tenant_id)
        try:
            await store.settle(waiting.place, set_aside=outcome == "damaged")
        except OSError as error:
            _log.warning("a segment could not be deleted; its events will be sent again", error=repr(error))
        self._backlog.done(waiting)
        metrics.SPOOL_SENT.labels(outcome=outcome).inc()
        self._work.set()

    # --- for operators ---
    @property
    def state(self) -> SpoolState:
        """How the spool is now."""
        store = self._store
        if store is None:
            return SpoolState(False, 0, 0, None, True)
        return SpoolState(True, len(self._backlog), store.size_bytes, self._backlog.oldest, store.full)

    @property
    def takes(self) -> bool:
        """Whether an event would be kept now, as far as is known."""
        return self._store is not None and not self._store.full

    def knows(self, tenant_id: str, event_id: str) -> bool:
        """Whether this tenant's event waits in this process's spool."""
        return self._backlog.knows(tenant_id, event_id)

    def waiting(self, *, after: str | None, limit: int) -> Sequence[Waiting]:
        """What waits, oldest first, behind the record that `after` names."""
        found = (waiting for waiting in self._backlog if after is None or record_name(waiting) > after)
        return [waiting for _, waiting in zip(range(limit), found, strict=False)]

    def expires_at(self, waiting: Waiting) -> datetime:
        """From when on the event is refused instead of applied."""
        return waiting.accepted_at + self._ttl

    async def replay(self, event_ids: Collection[str], patience: timedelta) -> dict[str, Replayed]:
        """Sends these events now, each after what is before it in its key; does not wait while the breaker is open.

        `waiting` is said of what is not in Kafka when `patience` ends, or was tried in vain.
        """
        named = self._backlog.wake(set(event_ids))
        self._work.set()
        attempts = [(waiting, waiting.attempts) for waiting in named]
        limit = timedelta(0) if self._log.openings == 0 else patience
        with suppress(TimeoutError):
            async with asyncio.timeout(limit.total_seconds()), self._settled:
                await self._settled.wait_for(lambda: all(waiting.gone or waiting.attempts > before for waiting, before in attempts))
        found = {waiting.event_id for waiting in named}
        left = {waiting.event_id for waiting in named if not waiting.gone}
        return {name: "waiting" if name in left else "published" if name in found else "not_found" for name in event_ids}

    def measure(self) -> None:
        """Brings the metrics up to date."""
        state = self.state
        metrics.SPOOL_RECORDS.set(state.records)
        metrics.SPOOL_BYTES.set(state.size_bytes)
        age = datetime.now(UTC) - state.oldest if state.oldest else timedelta(0)
        metrics.SPOOL_OLDEST_SECONDS.set(max(0.0, age.total_seconds()))


def record_name(waiting: Waiting) -> str:
    """A name for pages: names sort as records do."""
    return f"{waiting.place.segment}-{waiting.place.offset:012}"


async def _first_of(sending: set[asyncio.Task[None]], *signals: Awaitable[object]) -> set[asyncio.Task[None]]:
    """Waits until something was sent, a signal came, or a pause is over; what was sent."""
    listening = [asyncio.ensure_future(signal) for signal in signals]
    try:
        await asyncio.wait([*sending, *listening], timeout=PAUSE.total_seconds(), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in listening:
            future.cancel()
    return {task for task in sending if task.done()}
