"""Loops beside the requests."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Protocol

from tessera.contracts.errors import RetryableError
from tessera.gateway.handlers.handoff import Handoff
from tessera.resilience import CircuitOpenError
from tessera.telemetry import get_logger

Work = Callable[[asyncio.Event], Coroutine[Any, Any, None]]

_log = get_logger(__name__)


class Round(Protocol):
    """Something that is done again and again."""

    async def once(self) -> None:
        """One round. Raises RetryableError or CircuitOpenError where it has to wait for the next."""
        ...


def every(pause: timedelta, work: Round, failed: str, *, last: bool = False) -> Work:
    """One round, then a pause; with `last` another one before the service stops. One that fails is told as `failed`, the next is tried."""

    async def attempt() -> None:
        try:
            await work.once()
        except (RetryableError, CircuitOpenError) as error:
            _log.warning(failed, error=str(error))

    async def rounds(stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            await attempt()
            await _paused(stopping, pause)
        if last:
            await attempt()

    return rounds


async def _paused(stopping: asyncio.Event, pause: timedelta) -> None:
    try:
        async with asyncio.timeout(pause.total_seconds()):
            await stopping.wait()
    except TimeoutError:
        return


def drain_spool(handoff: Handoff) -> Work:
    """Hands over what is spooled, for as long as the service runs."""

    async def work(stopping: asyncio.Event) -> None:
        await handoff.drain(stopping)
        await stopping.wait()

    return work
