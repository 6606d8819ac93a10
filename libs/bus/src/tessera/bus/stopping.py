"""Stopping aiokafka's consumers, whatever their own tasks are doing."""

from __future__ import annotations

import asyncio

from aiokafka import AIOKafkaConsumer


async def stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stops it. Raises CancelledError only where the caller is cancelled.

    aiokafka 0.14 cancels its fetches and awaits them: one that had not begun, or that waited to repeat a failed request, hands its
    CancelledError on to whoever stops the consumer, and the connections stay open.
    """
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        await consumer._client.close()
