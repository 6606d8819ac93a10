"""From an engine's pieces to chunks in the log: coalesced, recorded, sent, resumed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from typing import Final

from tessera.bus import faults
from tessera.generator.domain.endings import Replay
from tessera.generator.domain.pieces import Coalescer, Piece, Said
from tessera.generator.domain.transcript import Chunk, Transcript
from tessera.generator.ports import ChunkSink, Engine, Job, JobStore
from tessera.telemetry import metrics

CHUNK_RECORDED_BEFORE_SENT: Final = "generator_chunk_recorded_before_sent"
CHUNK_SENT: Final = "generator_chunk_sent"


class Speaker:
    """Sends one attempt's text.

    What is about to be sent is recorded first: every chunk of a deterministic engine, so that another worker resumes after the last one;
    only the first chunk of any other, because all that matters is that a reader may have seen text.
    """

    def __init__(self, job: Job, engine: Engine, store: JobStore, sink: ChunkSink, coalesce: timedelta) -> None:
        self._job = job
        self._engine = engine
        self._store = store
        self._sink = sink
        self._coalescer = Coalescer(coalesce.total_seconds())
        self._began = time.monotonic()
        self.progress = job.progress

    async def say(self, pieces: AsyncGenerator[Piece, None], transcript: Transcript) -> None:
        """Takes every piece and sends what is to be streamed; returns when all of it is acknowledged.

        Raises what the engine or a port raises; what came before an error has been sent.
        """
        if self.progress.started:
            await self._sink.send(self._job, self.progress.last_chunk())
        async with aclosing(coalesced(taken(pieces, transcript, Replay(self.progress.text)), self._coalescer)) as chunks:
            async for said in chunks:
                if self._job.ready.request.stream:
                    await self._send(self.progress.next_chunk(said))

    async def _send(self, chunk: Chunk) -> None:
        after = self.progress.after(chunk)
        if self._engine.deterministic or not self.progress.started:
            await self._store.record(self._job, after)
        faults.reach(CHUNK_RECORDED_BEFORE_SENT)
        self.progress = after
        await self._sink.send(self._job, chunk)
        if chunk.index == 0:
            metrics.GENERATION_FIRST_CHUNK_SECONDS.labels(provider=self._engine.name).observe(time.monotonic() - self._began)
        faults.reach(CHUNK_SENT)


async def taken(pieces: AsyncGenerator[Piece, None], transcript: Transcript, replay: Replay) -> AsyncGenerator[Said, None]:
    """What each piece adds that was not sent before, up to a stop sequence. Closes `pieces` however it ends."""
    async with aclosing(pieces):
        async for piece in pieces:
            yield _unsaid(transcript.take(piece), replay)
            if transcript.ended:
                break
    for said in transcript.finish():
        yield _unsaid(said, replay)
    replay.finish()


def _unsaid(said: Said, replay: Replay) -> Said:
    """Without what was sent before, which only the first choice can have."""
    return said if said.choice else replace(said, text=replay.strip(said.text))


async def coalesced(said: AsyncGenerator[Said, None], coalescer: Coalescer) -> AsyncGenerator[Said, None]:
    """What was said, the first at once and the rest in pieces of the coalescer's interval; what came before an error is still passed on."""
    queue: asyncio.Queue[Said | None] = asyncio.Queue()
    pump = asyncio.create_task(_pumped(said, queue))
    clock = asyncio.get_running_loop().time
    try:
        more = True
        while more:
            more = await _collected(queue, coalescer, clock())
            if coalescer.wait_seconds(clock()) == 0 or not (more or coalescer.empty):
                for collected in coalescer.take(clock()):
                    yield collected
        await pump
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)


async def _collected(queue: asyncio.Queue[Said | None], coalescer: Coalescer, now: float) -> bool:
    """Collects one more, waiting no longer than what is collected may wait; False when there is no more."""
    try:
        async with asyncio.timeout(coalescer.wait_seconds(now)):
            said = await queue.get()
    except TimeoutError:
        return True
    if said is not None:
        coalescer.add(said)
    return said is not None


async def _pumped(said: AsyncGenerator[Said, None], queue: asyncio.Queue[Said | None]) -> None:
    try:
        async with aclosing(said):
            async for item in said:
                queue.put_nowait(item)
    finally:
        queue.put_nowait(None)
