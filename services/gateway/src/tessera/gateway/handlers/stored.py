"""Chats that are kept: written before they run, ended by their reply, and looked for in the log where that was missed."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from tessera.contracts.errors import RetryableError
from tessera.contracts.events import GenerationCompleted, GenerationFailed
from tessera.gateway.domain.answers import Answer
from tessera.gateway.domain.assembly import Ending
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.frames import encode_json
from tessera.gateway.domain.records import Since
from tessera.gateway.handlers.generations import assembled
from tessera.gateway.ports import Log, NewStored, Stored, StoredCompletions
from tessera.resilience import CircuitOpenError
from tessera.telemetry import get_logger

_GRACE: Final = timedelta(seconds=10)
_AGAIN: Final = timedelta(seconds=60)
_READING: Final = timedelta(seconds=10)
_AT_ONCE: Final = 20
_HOPELESS: Final = timedelta(days=1)
"""As long as the log keeps replies."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class Keeper:
    """Ends the row of one chat when its reply has come by."""

    stored: StoredCompletions
    tenant_id: str
    answer: Answer

    async def keep(self, ending: Ending) -> None:
        """Never in the way of the answer itself: where Postgres is away, the row is ended later, from the log."""
        try:
            await _end(self.stored, self.tenant_id, self.answer, ending)
        except (RetryableError, CircuitOpenError, ApiError) as error:
            _log.warning("completion_stored_later", generation_id=self.answer.generation_id, error=str(error))

    async def forget(self) -> None:
        """The generation was never published. Best effort: a row that stays is looked at later."""
        try:
            await self.stored.give_up(self.tenant_id, self.answer.generation_id)
        except (RetryableError, CircuitOpenError) as error:
            _log.warning("completion_stored_later", generation_id=self.answer.generation_id, error=str(error))


async def begun(
    stored: StoredCompletions, tenant_id: str, answer: Answer, *, request: Mapping[str, Any], since: Since, longest: timedelta
) -> Keeper:
    """The row, before its generation, which takes `longest` at most, is published. Raises RetryableError where it cannot be written."""
    created_at = datetime.fromtimestamp(answer.created, UTC)
    new = NewStored(
        id=answer.generation_id,
        model=answer.model_id,
        metadata=request.get("metadata") or {},
        request=encode_json({**request, "metadata": None, "consistency": answer.consistency}).decode(),
        subject_id=request.get("safety_identifier") or request.get("user"),
        since=since,
        created_at=created_at,
        look_at=datetime.now(UTC) + longest + _GRACE,
    )
    await stored.begin(tenant_id, new)
    return Keeper(stored, tenant_id, answer)


async def _end(stored: StoredCompletions, tenant_id: str, answer: Answer, ending: Ending) -> None:
    if isinstance(ending, GenerationCompleted):
        await stored.answer(tenant_id, answer.generation_id, encode_json(answer.whole(ending)).decode())
    else:
        await stored.give_up(tenant_id, answer.generation_id)


class Repair:
    """Ends rows whose gateway died, or that could not be written to when their reply came; deletes old ones."""

    def __init__(self, stored: StoredCompletions, log: Log, keep_for: timedelta, reading: timedelta = _READING) -> None:
        self._stored = stored
        self._log = log
        self._keep_for = keep_for
        self._reading = reading

    async def once(self) -> None:
        """One look at all that is due. Raises RetryableError where Postgres is away."""
        for row in await self._stored.overdue(_AT_ONCE, _AGAIN):
            await self._end(row)
        await self._stored.expire(self._keep_for, _AT_ONCE)

    async def _end(self, row: Stored) -> None:
        try:
            ending = await self._ending(row)
        except ApiError as error:
            if error.status != 410:
                _log.warning("completion_not_ended_yet", generation_id=row.id, error=error.message)
                return
            _log.warning("completion_lost", generation_id=row.id)
            await self._stored.give_up(row.tenant_id, row.id)
        except TimeoutError:
            if datetime.now(UTC) - row.created_at > _HOPELESS:
                await self._stored.give_up(row.tenant_id, row.id)
                return
            _log.warning("completion_not_ended_yet", generation_id=row.id, error="the log holds no end of it")
        else:
            consistency = json.loads(row.request).get("consistency")
            answer = Answer("chat", row.id, row.model, int(row.created_at.timestamp()), consistency=consistency)
            await _end(self._stored, row.tenant_id, answer, ending)
            _log.info("completion_ended_from_the_log", generation_id=row.id)

    async def _ending(self, row: Stored) -> Ending:
        """Raises TimeoutError where it is not in the log so far."""
        async with asyncio.timeout(self._reading.total_seconds()), self._log.stream(row.id, since=row.since) as replies:
            async for reply in assembled(replies):
                if isinstance(reply.data, GenerationCompleted | GenerationFailed):
                    return reply.data
        raise TimeoutError
