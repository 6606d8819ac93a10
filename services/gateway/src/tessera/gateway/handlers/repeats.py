"""The same request again, by its Idempotency-Key: done once, answered as often as it is asked."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

from tessera.contracts.errors import RetryableError
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.ports import Answers, Repeat
from tessera.resilience import CircuitOpenError
from tessera.telemetry import get_logger

LEASE: Final = timedelta(seconds=60)
"""A request whose gateway died is done again by whoever repeats it after this."""
MAXIMUM_ANSWER_CHARACTERS: Final = 1024 * 1024
_LOOK_EVERY: Final = timedelta(milliseconds=100)
_KEPT_FOR: Final = timedelta(days=1)
_AT_ONCE: Final = 1_000

_log = get_logger(__name__)

Given = tuple[int, str | None]
"""Status and text of an answer; None where it is not to be kept."""


async def answered(answers: Answers, tenant_id: str, repeat: Repeat, work: Callable[[], Awaitable[Given]], patience: timedelta) -> Given:
    """What stands under the key, or None in place of its text where `work` was done here and has answered.

    A request that is still being worked on is waited for. What fails is not kept: the next one does it again. Raises what `work` raises,
    ApiError 409 where the key came with another body or is in use for longer than `patience`.
    """
    until = asyncio.get_running_loop().time() + patience.total_seconds()
    while True:
        kept = await answers.claim(tenant_id, repeat, LEASE)
        if not kept.same_body:
            raise ApiError(409, "idempotency_key_reused", "This Idempotency-Key was used with another body.")
        if kept.status is not None:
            return kept.status, kept.answer
        if kept.mine:
            return await _done(answers, tenant_id, repeat, work)
        if asyncio.get_running_loop().time() >= until:
            raise ApiError(409, "idempotency_key_in_use", "A request with this Idempotency-Key is still being worked on.")
        await asyncio.sleep(_LOOK_EVERY.total_seconds())


async def _done(answers: Answers, tenant_id: str, repeat: Repeat, work: Callable[[], Awaitable[Given]]) -> Given:
    try:
        status, text = await work()
    except BaseException:
        await _quietly(answers.release(tenant_id, repeat), repeat)
        raise
    if status < 300 and text is not None and len(text) <= MAXIMUM_ANSWER_CHARACTERS:
        await _quietly(answers.keep(tenant_id, repeat, status, text), repeat)
    else:
        await _quietly(answers.release(tenant_id, repeat), repeat)
    return status, None


async def _quietly(work: Awaitable[None], repeat: Repeat) -> None:
    """The request itself went as it went: a key that stays taken is free again after its lease."""
    try:
        await work
    except (RetryableError, CircuitOpenError) as error:
        _log.warning("answer_not_kept", operation=repeat.operation, error=str(error))


class Forgetting:
    """Deletes answers of yesterday."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def once(self) -> None:
        """One round. Raises RetryableError where Postgres is away."""
        while await self._answers.expire(_KEPT_FOR, _AT_ONCE) == _AT_ONCE:
            continue
