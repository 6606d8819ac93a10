"""Putting on record what is done, and who was refused. `docs/audit.md` has the guarantee."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from tessera.contracts.errors import RetryableError, TesseraError
from tessera.contracts.events import AuditAction, AuditInspected, AuditRecorded, AuditReported
from tessera.gateway.domain import audit
from tessera.gateway.domain.audit import Actor
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.answering import expect
from tessera.gateway.ports import AuditTrail, Call, Log
from tessera.resilience import CircuitOpenError
from tessera.telemetry import get_logger

REMEMBERED_REFUSALS = 256

_log = get_logger(__name__)


@asynccontextmanager
async def on_record(trail: AuditTrail, act: AuditRecorded) -> AsyncIterator[None]:
    """Does not begin the block before `attempted` is committed, and says afterwards what came of it.

    Raises RetryableError or CircuitOpenError, and the block is not run, where the trail cannot be written.
    """
    await trail.write(audit.became(act, "attempted"))
    try:
        yield
    except Exception as error:
        await say_failed(trail, act, error)
        raise
    await _say(trail, audit.became(act, "succeeded"))


async def say_failed(trail: AuditTrail, act: AuditRecorded, error: Exception) -> None:
    """What came of an act that was attempted: refused, or not known. Where even this cannot be written, `attempted` stands alone."""
    refused = isinstance(error, ApiError) and error.status < 500
    code = error.code if isinstance(error, TesseraError) else "internal_error"
    await _say(trail, audit.became(act, "refused" if refused else "unknown", code))


async def _say(trail: AuditTrail, act: AuditRecorded) -> None:
    try:
        await trail.write(act)
    except (RetryableError, CircuitOpenError) as error:
        _log.warning("audit_outcome_not_written", action=act.action, outcome=act.outcome, error=str(error))


@dataclass(frozen=True)
class _Refused:
    """What refusals have in common that are told together."""

    action: AuditAction
    code: str
    by: Actor
    scope: str | None = None


@dataclass
class _Count:
    first: datetime
    times: int = 0


class Refusals:
    """Who was refused since the last round: one record for each key, address and reason, however many requests there were.

    What many addresses try at once is told together beyond the first REMEMBERED_REFUSALS, so that nobody outside decides how much is
    written. For one event loop.
    """

    def __init__(self, trail: AuditTrail) -> None:
        self._trail = trail
        self._counts: dict[_Refused, _Count] = {}

    def unauthenticated(self, by: Actor, code: str) -> None:
        """No key, or one that opens nothing."""
        self._count(_Refused("authentication.refused", code, by))

    def unauthorized(self, by: Actor, scope: str) -> None:
        """A key that may do other things."""
        self._count(_Refused("authorization.refused", "missing_scope", by, scope))

    async def once(self) -> None:
        """Writes what there is in one transaction. What cannot be written is written next time."""
        counted, self._counts = self._counts, {}
        if not counted:
            return
        try:
            await self._trail.write(*(_told(refused, count) for refused, count in counted.items()))
        except (RetryableError, CircuitOpenError):
            for refused, count in counted.items():
                self._add(refused, count)
            raise

    def _count(self, refused: _Refused) -> None:
        self._add(refused, _Count(datetime.now(UTC), 1))

    def _add(self, refused: _Refused, count: _Count) -> None:
        if refused not in self._counts and len(self._counts) >= REMEMBERED_REFUSALS:
            refused = _Refused(refused.action, refused.code, Actor("unknown"), refused.scope)
        known = self._counts.setdefault(refused, _Count(count.first))
        known.times += count.times
        known.first = min(known.first, count.first)


def _told(refused: _Refused, count: _Count) -> AuditRecorded:
    told = audit.record(
        refused.by, refused.action, tenant_id=refused.by.tenant_id, details={"scope": refused.scope}, outcome="refused", code=refused.code
    )
    return told.model_copy(update={"count": count.times, "occurred_at": count.first})


async def inspect(log: Log, question: AuditInspected, call: Call) -> AuditReported:
    """One page of the trail. Raises ApiError 400 `invalid_value` for a cursor that does not exist."""
    return expect(AuditReported, await log.ask(question, call))
