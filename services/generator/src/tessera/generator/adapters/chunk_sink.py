"""Chunks on the reply topic, straight to the asker's partition."""

from __future__ import annotations

from tessera.bus import Bus
from tessera.contracts import GenerationChunk
from tessera.generator.domain.transcript import Chunk
from tessera.generator.ports import Job


class BusChunkSink:
    """Publishes past the outbox: a chunk is worth nothing later."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def send(self, job: Job, chunk: Chunk) -> None:
        """Waits for the acknowledgement. Raises RetryableError."""
        await self._bus.publish(
            GenerationChunk(
                generation_id=job.generation_id,
                attempt=job.attempt,
                index=chunk.index,
                choice=chunk.choice or None,
                text_offset=chunk.text_offset,
                text=chunk.text,
                delta=dict(chunk.delta) or None,
            ),
            tenant_id=job.tenant_id,
            key=job.generation_id.encode(),
            partition=job.ready.request.reply_partition,
            subject_id=job.origin.subject_id,
            request_id=job.origin.request_id,
        )
