"""Dead letters in the log, and what was decided about them in Postgres."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from datetime import timedelta
from typing import Final

from sqlalchemy import text

from tessera import resilience
from tessera.bus import Bus, DeadLetter, DeadLetterSummary, LetterFilter, LetterPage, faults
from tessera.contracts.events import AuditRecorded
from tessera.gateway.adapters.audit import origin_of, put
from tessera.gateway.adapters.log import told
from tessera.gateway.ports import Decision, Keep, Outcome
from tessera.resilience import Breaker
from tessera.storage import Database

REPLAYED_BEFORE_REMEMBERED: Final = "replayed_before_remembered"
"""Crash point: the event is in the log again, and nobody knows."""

_FIND = text("""
    SELECT topic, digest, outcome, decided_at, decided_by FROM dead_letter_decisions
    WHERE (topic, digest) IN (SELECT * FROM unnest(CAST(:topics AS text[]), CAST(:digests AS bytea[])))
""")
_DECIDE = text("""
    INSERT INTO dead_letter_decisions (topic, digest, outcome, decided_by) VALUES (:topic, :digest, :outcome, :by) ON CONFLICT DO NOTHING
""")


class LoggedDeadLetters:
    """Implements `ports.DeadLetters`."""

    def __init__(self, bus: Bus, breaker: Breaker, patience: timedelta) -> None:
        self._bus = bus
        self._breaker = breaker
        self._patience = patience

    async def page(self, wanted: LetterFilter, *, limit: int, keep: Keep, newest_first: bool, cursor: str | None) -> LetterPage:
        """Reads the log within its limits."""
        return await self._bus.dead_letters.page(wanted, limit=limit, keep=keep, newest_first=newest_first, cursor=cursor)

    def letters(self, ids: Iterable[str]) -> AsyncGenerator[tuple[str, DeadLetter | None], None]:
        """One after the other, in the order of the log."""
        return self._bus.dead_letters.letters(ids)

    async def replay(self, letter: DeadLetter, *, dry_run: bool) -> None:
        """Publishes the original, behind the breaker that all publishing is behind."""
        with told(doubt=True):
            async with self._breaker.guard(), resilience.deadline(self._patience):
                await self._bus.replay(letter, dry_run=dry_run)
        if not dry_run:
            faults.reach(REPLAYED_BEFORE_REMEMBERED)


class PostgresDecisions:
    """Implements `ports.Decisions`. The operator's view: it works across tenants, with the worker role."""

    def __init__(self, database: Database, bus: Bus) -> None:
        self._database = database
        self._bus = bus

    async def of(self, letters: Sequence[DeadLetterSummary]) -> dict[str, Decision]:
        """By the letter's id; those not decided on are missing."""
        if not letters:
            return {}
        asked = {"topics": [letter.place.topic for letter in letters], "digests": [letter.digest for letter in letters]}
        async with self._database.transaction() as connection:
            rows = await connection.execute(_FIND, asked)
        found = {(row.topic, bytes(row.digest)): Decision(row.outcome, row.decided_at, row.decided_by) for row in rows}
        return {letter.id: found[key] for letter in letters if (key := (letter.place.topic, letter.digest)) in found}

    async def decide(self, letter: DeadLetterSummary, outcome: Outcome, act: AuditRecorded) -> None:
        """The first decision stands."""
        values = {"topic": letter.place.topic, "digest": letter.digest, "outcome": outcome, "by": act.actor.id or act.actor.kind}
        async with self._bus.transaction(origin_of(act.tenant, act.request_id)) as transaction:
            await transaction.connection.execute(_DECIDE, values)
            await put(transaction, act)
