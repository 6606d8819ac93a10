"""Listing dead letters and deciding about them. `docs/dead-letters.md` has the invariant."""

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Literal

from tessera.bus import DeadLetter, DeadLetterSummary, LetterFilter
from tessera.bus.codec import is_tenant_id
from tessera.contracts.events import AuditAction, AuditRecorded, AuditTarget
from tessera.gateway.domain import audit, errors
from tessera.gateway.domain.audit import Actor
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.auditing import say_failed
from tessera.gateway.ports import AuditTrail, DeadLetters, Decision, Decisions, Outcome
from tessera.telemetry import get_logger

Status = Literal["pending", "replayed", "discarded", "all"]
Result = Literal[
    "replayed", "discarded", "would_be_replayed", "would_be_discarded", "already_replayed", "already_discarded", "not_found", "failed"
]

_DONE: dict[Outcome, Result] = {"replayed": "replayed", "discarded": "discarded"}
_WOULD: dict[Outcome, Result] = {"replayed": "would_be_replayed", "discarded": "would_be_discarded"}
_ACTIONS: dict[Outcome, AuditAction] = {"replayed": "dead_letter.replay", "discarded": "dead_letter.discard"}
_ALREADY: dict[Outcome, Result] = {"replayed": "already_replayed", "discarded": "already_discarded"}

_TOGETHER: Final = 10
"""Letters that are held at once: each may have the size of the largest event."""

Named = tuple[str, DeadLetter | None]
"""An id, and the letter where there is one."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class Desk:
    """What an operator decides with."""

    letters: DeadLetters
    decisions: Decisions
    trail: AuditTrail


@dataclass(frozen=True)
class Listing:
    """One page: each letter with what was decided about it, and where to go on."""

    letters: list[tuple[DeadLetterSummary, Decision | None]]
    next_cursor: str | None


@dataclass(frozen=True)
class Order:
    """What shall become of letters, and who says so."""

    outcome: Outcome
    by: Actor
    dry_run: bool


@dataclass(frozen=True)
class Settled:
    """What became of one letter."""

    id: str
    result: Result
    error: ApiError | None = None


async def listing(desk: Desk, wanted: LetterFilter, status: Status, *, limit: int, newest_first: bool, cursor: str | None) -> Listing:
    """Raises InvalidError `invalid_value` for a topic or a cursor that does not exist."""

    async def keep(found: Sequence[DeadLetterSummary]) -> Sequence[DeadLetterSummary]:
        if status == "all":
            return found
        decided = await desk.decisions.of(found)
        return [letter for letter in found if (decided[letter.id].outcome if letter.id in decided else "pending") == status]

    page = await desk.letters.page(wanted, limit=limit, keep=keep, newest_first=newest_first, cursor=cursor)
    decided = {} if status == "pending" else await desk.decisions.of(page.letters)
    return Listing([(letter, decided.get(letter.id)) for letter in page.letters], page.next_cursor)


async def find(desk: Desk, letter_id: str) -> tuple[DeadLetter, Decision | None]:
    """The letter with its bytes. Raises ApiError 404 `dead_letter_not_found`."""
    async with aclosing(desk.letters.letters([letter_id])) as found:
        async for _, letter in found:
            if letter is not None:
                return letter, (await desk.decisions.of([letter.summary])).get(letter_id)
    raise errors.not_found("dead_letter_not_found", f"The dead letter '{letter_id}'")


async def settle(desk: Desk, ids: Sequence[str], order: Order) -> list[Settled]:
    """Carries an order out, letter by letter in the order of the log. One that fails does not stop the others."""
    settled: list[Settled] = []
    async with aclosing(desk.letters.letters(ids)) as letters, aclosing(_batches(letters)) as batches:
        async for batch in batches:
            settled += await _settle(desk, batch, order)
    if not order.dry_run:
        _log.info("dead letters decided", outcome=order.outcome, by=order.by.id, results=dict(Counter(one.result for one in settled)))
    return settled


async def _batches(letters: AsyncIterator[Named]) -> AsyncGenerator[list[Named], None]:
    """Neighbours, for the sake of fewer transactions. Copies of one letter are in different ones: the second finds what was decided."""
    batch: list[Named] = []
    digests: set[bytes] = set()
    async for letter_id, letter in letters:
        if len(batch) == _TOGETHER or (letter is not None and letter.summary.digest in digests):
            yield batch
            batch, digests = [], set()
        batch.append((letter_id, letter))
        digests |= {letter.summary.digest} if letter is not None else set()
    if batch:
        yield batch


async def _settle(desk: Desk, batch: Sequence[Named], order: Order) -> list[Settled]:
    known = [letter.summary for _, letter in batch if letter is not None]
    decided = await desk.decisions.of(known)
    acts = {letter.id: _act(letter, order) for letter in known if letter.id not in decided}
    if order.outcome == "replayed" and not order.dry_run:
        await desk.trail.write(*(audit.became(act, "attempted") for act in acts.values()))
    settled = []
    for letter_id, letter in batch:
        if letter is None:
            settled.append(Settled(letter_id, "not_found"))
        elif (before := decided.get(letter.summary.id)) is not None:
            settled.append(Settled(letter.summary.id, _ALREADY[before.outcome]))
        elif order.dry_run:
            settled.append(await _tried(desk, letter, order.outcome))
        else:
            settled.append(await _done(desk, letter, order.outcome, acts[letter.summary.id]))
    return settled


async def _done(desk: Desk, letter: DeadLetter, outcome: Outcome, act: AuditRecorded) -> Settled:
    if outcome == "replayed":
        try:
            await desk.letters.replay(letter, dry_run=False)
        except ApiError as error:
            await say_failed(desk.trail, act, error)
            return Settled(letter.summary.id, "failed", error)
    await desk.decisions.decide(letter.summary, outcome, audit.became(act, "succeeded"))
    return Settled(letter.summary.id, _DONE[outcome])


async def _tried(desk: Desk, letter: DeadLetter, outcome: Outcome) -> Settled:
    if outcome == "replayed":
        try:
            await desk.letters.replay(letter, dry_run=True)
        except ApiError as error:
            return Settled(letter.summary.id, "failed", error)
    return Settled(letter.summary.id, _WOULD[outcome])


def _act(letter: DeadLetterSummary, order: Order) -> AuditRecorded:
    known = letter.tenant_id if letter.tenant_id and is_tenant_id(letter.tenant_id) else None
    return audit.record(order.by, _ACTIONS[order.outcome], tenant_id=known, target=AuditTarget(kind="dead_letter", id=letter.id))
