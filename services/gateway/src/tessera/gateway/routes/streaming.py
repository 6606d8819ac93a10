"""Answers that stream, and answers that are waited for by a client who may leave."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.generations import Following

T = TypeVar("T")

CLIENT_GONE: Final = ApiError(499, "client_disconnected", "The client left before the answer was ready.")


class EventStream(StreamingResponse):
    """Server-sent events of a generation; however the response ends, the generation is closed, and cancelled if it had not ended.

    Then `held` is given back.
    """

    def __init__(self, generation: Following, frames: AsyncIterator[bytes], held: AsyncExitStack) -> None:
        super().__init__(
            frames, media_type="text/event-stream", headers={"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        )
        self._generation = generation
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        async with self._held:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._generation.close()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ApiError 499 then; nobody reads it."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CLIENT_GONE
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
