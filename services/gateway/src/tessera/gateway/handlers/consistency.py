"""Reads that must be fresh: ask, and ask again, until the answer is or the time is over (docs/consistency.md)."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from tessera.contracts.base import EventData, RequestData
from tessera.contracts.events import Freshness, FreshnessInspected, FreshnessReported, ReadConsistency
from tessera.gateway.domain import errors
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.answering import expect
from tessera.gateway.ports import Call, Log

SLICE: Final = timedelta(seconds=4)
"""Longest wait in memory at once: whoever waits there is forgotten when the process dies, and has to ask again."""
_GRACE: Final = timedelta(seconds=2)
"""What an answer may take beyond the wait."""
_PAUSE_SECONDS: Final = 0.25
"""Before asking again where memory did not wait as long as it was asked to: it has enough readers waiting."""


@dataclass(frozen=True)
class Fresh:
    """How long to wait for what."""

    wanted: ReadConsistency
    wait: timedelta


async def asked(log: Log, question: Callable[[ReadConsistency], RequestData], fresh: Fresh, call: Call) -> EventData:
    """The answer to the question, as soon as it is fresh enough or known not to become so in time.

    Raises as `Log.ask` does; a question that got no answer is asked again while there is time.
    """
    clock = asyncio.get_running_loop().time
    ends_at = clock() + call.patience.total_seconds()
    until = min(clock() + fresh.wait.total_seconds(), ends_at)
    wanted = fresh.wanted
    while True:
        wait = min(max(0.0, until - clock()), SLICE.total_seconds())
        began = clock()
        left = max(0.0, ends_at - began)
        patience = min(left, wait + _GRACE.total_seconds()) if fresh.wait else left
        data = question(wanted.model_copy(update={"wait_seconds": wait}))
        try:
            answer = await log.ask(data, Call(call.tenant_id, call.request_id, timedelta(seconds=patience)))
        except ApiError as error:
            if error.code != errors.timed_out("").code or clock() >= until:
                raise
            continue
        freshness = getattr(answer, "freshness", None)
        if not isinstance(freshness, Freshness) or freshness.standing == "satisfied" or not freshness.waiting_may_help or clock() >= until:
            return answer
        wanted = _again(wanted, freshness)
        if clock() - began < wait:
            await asyncio.sleep(min(until - clock(), _PAUSE_SECONDS * random.uniform(0.5, 1.5)))  # noqa: S311  # nosec B311 - no secret


def _again(wanted: ReadConsistency, freshness: Freshness) -> ReadConsistency:
    """The same demand: the log's end was looked for once, and whoever asks again must not wait for what came since."""
    if wanted.level != "strong" and wanted.maximum_age_seconds is None:
        return wanted
    return ReadConsistency(level="read_your_writes", ends=freshness.awaited, stage=wanted.stage)


async def awaited(log: Log, fresh: Fresh, call: Call) -> tuple[ReadConsistency, Freshness | None]:
    """Waits until memory is fresh enough; returns what a later read has to prove again, without waiting, and how fresh memory was.

    Raises ApiError as `checked` does.
    """
    wanted, reply_partition = fresh.wanted, log.reply_partition
    answer = await asked(log, lambda consistency: FreshnessInspected(reply_partition=reply_partition, consistency=consistency), fresh, call)
    freshness = checked(expect(FreshnessReported, answer).freshness)
    if wanted.level == "eventual" or freshness is None:
        return wanted, freshness
    # What was searchable stays so; whether everything is, is not asked again: others go on writing.
    ends = freshness.ends if wanted.level == "strong" or wanted.maximum_age_seconds is not None else wanted.ends
    return ReadConsistency(level="read_your_writes", writes=wanted.writes, ends=ends, stage=None), freshness


def checked(freshness: Freshness | None) -> Freshness | None:
    """The freshness of an answer. Raises ApiError where there is no answer because it would not be fresh enough.

    503 `not_up_to_bound` and `write_pending`, 409 `write_refused`.
    """
    if freshness is None or freshness.standing == "satisfied":
        return freshness
    why = f" {freshness.reason.code}: {freshness.reason.message}" if freshness.reason else ""
    later = errors.RETRY_LATER
    if freshness.standing == "refused":
        raise ApiError(409, "write_refused", f"What you want to read was refused and will not be visible.{why}")
    if freshness.standing == "pending":
        raise ApiError(503, "write_pending", f"What you want to read could not be applied yet; it is parked.{why}", retry_after=later)
    raise ApiError(503, "not_up_to_bound", "Memory is not as fresh as you ask for. Try again, or wait longer.", retry_after=later)
