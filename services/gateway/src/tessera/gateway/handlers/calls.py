"""How many calls each key made, and how many of them failed: counted here, added up in Postgres."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from tessera.contracts import uuid7
from tessera.gateway.domain.calls import Counted
from tessera.gateway.domain.keys import Principal
from tessera.gateway.ports import CallSums

CLIENT_LEFT: Final = 499
"""The status of an answer that nobody was there for."""


@dataclass(frozen=True)
class Counts:
    """Calls that are to be added once, however often they are handed over."""

    id: UUID
    requests: Counter[Counted]
    errors: Counter[Counted]


class Calls:
    """The calls of this replica since the last round. For one event loop.

    A replica that is killed takes those since its last round with it.
    """

    def __init__(self, sums: CallSums) -> None:
        self._sums = sums
        self._requests: Counter[Counted] = Counter()
        self._errors: Counter[Counted] = Counter()
        self._handed_over: Counts | None = None
        """What may or may not have been added."""

    def note(self, principal: Principal, operation: str, status: int) -> None:
        """One call. A client that left before its answer made no error."""
        counted = Counted(principal.tenant_id, datetime.now(UTC).date(), principal.key_id, operation)
        self._requests[counted] += 1
        if status >= 400 and status != CLIENT_LEFT:
            self._errors[counted] += 1

    async def once(self) -> None:
        """Adds what there is. Raises RetryableError; then the same is handed over again."""
        if self._handed_over is None:
            if not self._requests:
                return
            self._handed_over = Counts(uuid7(), self._requests, self._errors)
            self._requests, self._errors = Counter(), Counter()
        await self._sums.add(self._handed_over.id, *_rows(self._handed_over))
        self._handed_over = None


def _rows(counts: Counts) -> list[tuple[Counted, int, int]]:
    """In one order, so that no two replicas wait for each other."""
    return [(counted, counts.requests[counted], counts.errors[counted]) for counted in sorted(counts.requests)]
