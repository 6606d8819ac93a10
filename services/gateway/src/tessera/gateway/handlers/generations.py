"""One request to a model: publish it, follow its replies, cancel it when nobody waits any more."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from tessera.contracts import derived_id, uuid7
from tessera.contracts.errors import TesseraError
from tessera.contracts.events import GenerationCancelled, GenerationCompleted, GenerationFailed, GenerationRequested
from tessera.gateway.domain import errors
from tessera.gateway.domain.answers import StreamedAnswer, error_frame
from tessera.gateway.domain.assembly import Assembly, Ending, Located
from tessera.gateway.domain.errors import ApiError, of_error, of_problem
from tessera.gateway.domain.frames import KEEP_ALIVE
from tessera.gateway.ports import Call, Claim, Generations, Log, Since
from tessera.resilience import TimedOutError
from tessera.telemetry import get_logger

CancelReason = Literal["client_disconnected", "deadline"]
Keep = Callable[[Ending], Awaitable[None]]
"""Called with the end before anybody is given it."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """How long a generation may take, and how often a quiet stream shows that it lives."""

    timeout: timedelta = timedelta(seconds=120)
    keep_alive: timedelta = timedelta(seconds=15)


def generation_id(tenant_id: str, idempotency_key: str | None) -> str:
    """The same for the same tenant and Idempotency-Key; new without one."""
    if idempotency_key is None:
        return str(uuid7())
    return str(derived_id(f"{tenant_id}\x00{idempotency_key}", "generation"))


async def claimed(generations: Generations, log: Log, request: GenerationRequested, call: Call, body_digest: bytes) -> Claim:
    """The row of a generation with an Idempotency-Key, before its event. Raises ApiError 409 where the key came with another body."""
    since = Since(request.reply_partition, await log.next_offset(request.reply_partition))
    claim = await generations.claim(call.tenant_id, request.generation_id, body_digest, since)
    if not claim.same_body:
        raise ApiError(409, "idempotency_key_reused", "This Idempotency-Key was used with another body.")
    return claim


class Generation:
    """A generation whose replies are being followed. `close` must be called; it cancels what has not ended.

    With a claim it is not cancelled when the client leaves: the key says that it may be asked for again, and whoever asks joins it.
    """

    def __init__(
        self, log: Log, request: GenerationRequested, call: Call, limits: Limits, *, claim: Claim | None = None, keep: Keep | None = None
    ) -> None:
        self._claim = claim
        self._keep = keep
        self._log = log
        self._request = request
        self._call = call
        self._limits = limits
        self._stack = AsyncExitStack()
        self._expires_at = 0.0
        self._published = False
        self._ended = False

    async def open(self) -> None:
        """Listens, then publishes. Raises ApiError 503 when Kafka cannot be reached, 410 when the log no longer holds what is joined.

        Who joins publishes again, with the same id: the first may have died between its row and its event, and a repeat changes nothing.
        """
        self._expires_at = asyncio.get_running_loop().time() + self._limits.timeout.total_seconds()
        joined = self._claim.since if self._claim and not self._claim.first else None
        replies = await self._stack.enter_async_context(self._log.stream(self._request.generation_id, since=joined))
        self._replies = assembled(replies)
        await self._log.publish(
            self._request,
            self._call,
            event_id=self._request.generation_id,
            key=self._request.generation_id.encode(),
            deadline=datetime.now(UTC) + self._limits.timeout,
        )
        self._published = True

    async def completed(self) -> GenerationCompleted:
        """Waits for the end. Raises ApiError with the failure's problem, or 504 when the time is over."""
        async for reply in self._followed():
            if reply is not None and isinstance(reply.data, GenerationCompleted):
                return reply.data
            if reply is not None and isinstance(reply.data, GenerationFailed):
                raise of_problem(reply.data.problem)
        raise _cut_off()

    async def frames(self, answer: StreamedAnswer) -> AsyncIterator[bytes]:
        """Server-sent events until the end. Whatever goes wrong becomes an error event, never a silent end."""
        try:
            async for reply in self._followed():
                yield KEEP_ALIVE if reply is None else b"".join(answer.frames(reply))
            if not self._ended:
                yield error_frame(_cut_off())
        except TesseraError as error:
            yield error_frame(of_error(error))

    async def close(self, reason: CancelReason = "client_disconnected") -> None:
        """Stops listening; a generation that has not ended is cancelled. May be called again."""
        if self._published and not self._ended and self._claim is None:
            await self._cancel(reason)
        self._ended = True
        await self._stack.aclose()

    async def _followed(self) -> AsyncIterator[Located | None]:
        """Assembled replies, None as a sign of life. Raises ApiError 504 when the time is over."""
        try:
            async for reply in _with_keep_alive(self._replies, self._limits.keep_alive, self._expires_at):
                if reply is not None and isinstance(reply.data, GenerationCompleted | GenerationFailed):
                    self._ended = True
                    if self._keep is not None:
                        await self._keep(reply.data)
                yield reply
        except TimedOutError as error:
            await self.close("deadline")
            raise errors.timed_out("The model") from error

    async def _cancel(self, reason: CancelReason) -> None:
        """Best effort: the generation also ends by its own deadline."""
        cancelled = GenerationCancelled(generation_id=self._request.generation_id, reason=reason)
        try:
            await self._log.publish(cancelled, self._call, key=self._request.generation_id.encode())
        except ApiError as error:
            _log.warning("generation_not_cancelled", generation_id=self._request.generation_id, reason=reason, error=error.message)


async def assembled(replies: AsyncIterator[Located]) -> AsyncIterator[Located]:
    """The replies of one generation in order, each once, up to its end."""
    assembly = Assembly()
    async for reply in replies:
        for ready in assembly.feed(reply):
            yield ready
        if assembly.finished:
            return


async def _with_keep_alive(replies: AsyncIterator[Located], interval: timedelta, expires_at: float) -> AsyncIterator[Located | None]:
    """The replies, and None whenever none came for `interval`. Raises TimedOutError at `expires_at` of the loop's clock."""
    clock = asyncio.get_running_loop().time
    waiting = asyncio.ensure_future(anext(replies, None))
    try:
        while (remaining := expires_at - clock()) > 0:
            done, _ = await asyncio.wait((waiting,), timeout=min(interval.total_seconds(), remaining))
            if not done:
                yield None
                continue
            if (reply := waiting.result()) is None:
                return
            waiting = asyncio.ensure_future(anext(replies, None))
            yield reply
        raise TimedOutError("the generation's time is over")
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait((waiting,), timeout=1)


def _cut_off() -> ApiError:
    return ApiError(502, "generation_interrupted", "The generation ended without a result.")
