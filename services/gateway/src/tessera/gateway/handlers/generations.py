"""One request to a model: publish it, follow its replies, cancel it when nobody waits any more."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from tessera.contracts import derived_id, uuid7
from tessera.contracts.errors import TesseraError
from tessera.contracts.events import (
    OPERATION,
    GenerationCancelled,
    GenerationChunk,
    GenerationCompleted,
    GenerationFailed,
    GenerationRequested,
)
from tessera.gateway.domain import errors
from tessera.gateway.domain.answers import StreamedAnswer, error_frame
from tessera.gateway.domain.assembly import Assembly, Ending, Located
from tessera.gateway.domain.errors import ApiError, of_error, of_problem
from tessera.gateway.domain.frames import KEEP_ALIVE, FrameId
from tessera.gateway.domain.records import Since
from tessera.gateway.ports import Call, Claim, Generations, Log
from tessera.resilience import TimedOutError
from tessera.telemetry import get_logger, metrics

CancelReason = Literal["client_disconnected", "client_request", "deadline"]
Keep = Callable[[Ending], Awaitable[None]]
"""Called with the end before anybody is given it."""
IsKnown = Callable[[], Awaitable[bool]]
"""Whether the event of a generation has been heard of. Never raises."""
_UNHEARD_OF: Final = timedelta(seconds=5)
_SEEKING: Final = timedelta(seconds=10)

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


async def claimed(generations: Generations, request: GenerationRequested, call: Call, body_digest: bytes) -> Claim:
    """The row of a generation with an Idempotency-Key, before its event. Raises ApiError 409 where the key came with another body."""
    since = Since(request.reply_partition, request.reply_offset or 0)
    claim = await generations.claim(call.tenant_id, request.generation_id, body_digest, since)
    if not claim.same_body:
        raise ApiError(409, "idempotency_key_reused", "This Idempotency-Key was used with another body.")
    return claim


class Following:
    """The replies of one generation, from before its first. `close` must be called."""

    def __init__(self, log: Log, generation_id: str, limits: Limits, *, keep: Keep | None = None) -> None:
        self._generation_id = generation_id
        self._log = log
        self._limits = limits
        self._keep = keep
        self._stack = AsyncExitStack()
        self._expires_at = 0.0
        self._ended = False

    async def listen(self, since: Since | None = None) -> None:
        """To what comes from now on, or, with `since`, to what the log holds from there. Raises ApiError 410 where it does not, 503."""
        self._expires_at = asyncio.get_running_loop().time() + self._limits.timeout.total_seconds()
        replies = await self._stack.enter_async_context(self._log.stream(self._generation_id, since=since))
        self._replies = self._followed(assembled(replies))

    async def completed(self) -> GenerationCompleted:
        """Waits for the end. Raises ApiError with the failure's problem, or 504 when the time is over."""
        async for reply in self._replies:
            if reply is not None and isinstance(reply.data, GenerationCompleted):
                return reply.data
            if reply is not None and isinstance(reply.data, GenerationFailed):
                raise of_problem(reply.data.problem)
        raise _cut_off()

    async def frames(self, answer: StreamedAnswer) -> AsyncIterator[bytes]:
        """Server-sent events until the end. Whatever goes wrong becomes an error event, never a silent end."""
        try:
            async for reply in self._replies:
                yield KEEP_ALIVE if reply is None else b"".join(answer.frames(reply))
            if not self._ended:
                yield error_frame(_cut_off())
        except TesseraError as error:
            yield error_frame(of_error(error))

    async def frames_after(self, answer: StreamedAnswer, last: FrameId) -> AsyncIterator[bytes]:
        """As `frames`, from behind the frame `last`.

        Returns once that has been found, so that a reader of another stream is told before its answer begins. Raises ApiError 400
        `last_event_id_unknown`.
        """
        rest = await self._beyond(answer, last)

        async def frames() -> AsyncIterator[bytes]:
            yield rest
            if not self._ended:
                async for frame in self.frames(answer):
                    yield frame

        return frames()

    async def close(self) -> None:
        """Stops listening. May be called again."""
        self._ended = True
        await self._stack.aclose()

    async def _beyond(self, answer: StreamedAnswer, last: FrameId) -> bytes:
        """What the reply that gave the frame `last` gives beyond it."""
        if last.generation_id == self._generation_id:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SEEKING.total_seconds()):
                    async for reply in self._replies:
                        frames = [] if reply is None else answer.located(reply)
                        places = [place for place, _ in frames]
                        if last in places:
                            return b"".join(frame for _, frame in frames[places.index(last) + 1 :])
        raise errors.last_event_id_unknown()

    async def _followed(self, replies: AsyncIterator[Located]) -> AsyncIterator[Located | None]:
        """Assembled replies, None as a sign of life. Raises ApiError 504 when the time is over."""
        try:
            async for reply in _with_keep_alive(replies, self._limits.keep_alive, self._expires_at):
                if reply is not None:
                    self._note(reply)
                if reply is not None and isinstance(reply.data, GenerationCompleted | GenerationFailed):
                    self._ended = True
                    if self._keep is not None:
                        await self._keep(reply.data)
                yield reply
        except TimedOutError as error:
            await self._out_of_time()
            raise errors.timed_out("The model") from error

    def _note(self, reply: Located) -> None:
        """Called with each reply before its reader has it."""

    async def _out_of_time(self) -> None:
        """Called before the reader is told."""
        await self.close()


class Generation(Following):
    """A generation that is published here. `close` cancels what has not ended, unless it is to be finished without its reader.

    With a claim it can be asked for again, and whoever asks joins it.
    """

    def __init__(
        self,
        log: Log,
        request: GenerationRequested,
        call: Call,
        limits: Limits,
        *,
        claim: Claim | None = None,
        finishes: bool = False,
        is_known: IsKnown | None = None,
        keep: Keep | None = None,
    ) -> None:
        super().__init__(log, request.generation_id, limits, keep=keep)
        self._claim = claim
        self._finishes = finishes
        self._is_known = is_known
        self._request = request
        self._call = call
        self._published = False
        self._published_at: float | None = None
        self._begun = False

    async def open(self) -> None:
        """Listens, then publishes. Raises ApiError 503 when Kafka cannot be reached, 410 when the log no longer holds what is joined.

        Who joins publishes again, with the same id, only where nobody has heard of it for five seconds: the first may have died between
        its row and its event.
        """
        joins = self._claim is not None and not self._claim.first
        await self.listen(self._claim.since if self._claim and joins else None)
        if not joins or self._is_known is None:
            await self._publish()
            return
        self._published = True
        watching = asyncio.create_task(self._publish_unless_known(self._is_known))
        self._stack.push_async_callback(_ended_quietly, watching)

    async def close(self, reason: CancelReason = "client_disconnected") -> None:
        """Stops listening; a generation that has not ended is cancelled, or goes on by itself. May be called again."""
        if self._published and not self._ended and not self._finishes:
            await self._cancel(reason)
        await super().close()

    async def _out_of_time(self) -> None:
        await self.close("deadline")

    def _note(self, reply: Located) -> None:
        """Measures what was asked for here; who joins or comes later measures nothing."""
        if self._published_at is None:
            return
        passed, model = time.monotonic() - self._published_at, self._request.model
        labels = (OPERATION[model.capability], model.provider, model.model_id)
        if not self._begun:
            self._begun = True
            metrics.GEN_AI_SERVER_FIRST_SECONDS.labels(*labels).observe(passed)
        if not isinstance(reply.data, GenerationChunk):
            error = reply.data.problem.code if isinstance(reply.data, GenerationFailed) else ""
            metrics.GEN_AI_SERVER_SECONDS.labels(*labels, error).observe(passed)

    async def _publish(self) -> None:
        self._published_at = time.monotonic()
        await self._log.publish(
            self._request,
            self._call,
            event_id=self._request.generation_id,
            key=self._request.generation_id.encode(),
            deadline=datetime.now(UTC) + self._limits.timeout,
        )
        self._published = True

    async def _publish_unless_known(self, is_known: IsKnown) -> None:
        """Best effort: where it fails, the reader is told that nothing came in time."""
        for pause in (timedelta(0), _UNHEARD_OF):
            await asyncio.sleep(pause.total_seconds())
            if await is_known():
                return
        try:
            await self._publish()
        except ApiError as error:
            _log.warning("generation_not_published_again", generation_id=self._request.generation_id, error=error.message)

    async def _cancel(self, reason: CancelReason) -> None:
        """Best effort: the generation also ends by its own deadline."""
        try:
            await cancel(self._log, self._request.generation_id, self._call, reason)
        except ApiError as error:
            _log.warning("generation_not_cancelled", generation_id=self._request.generation_id, reason=reason, error=error.message)


async def cancel(log: Log, generation_id: str, call: Call, reason: CancelReason) -> None:
    """Has a generation stopped, wherever it runs; one that has ended stays as it is. Raises ApiError 503."""
    cancelled = GenerationCancelled(generation_id=generation_id, reason=reason)
    await log.publish(cancelled, call, key=generation_id.encode())


async def _ended_quietly(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


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
