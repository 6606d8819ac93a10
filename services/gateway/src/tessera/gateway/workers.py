"""Loops beside the requests."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tessera.gateway.handlers.handoff import Handoff

Work = Callable[[asyncio.Event], Coroutine[Any, Any, None]]


def drain_spool(handoff: Handoff) -> Work:
    """Hands over what is spooled, for as long as the service runs."""

    async def work(stopping: asyncio.Event) -> None:
        await handoff.drain(stopping)
        await stopping.wait()

    return work
