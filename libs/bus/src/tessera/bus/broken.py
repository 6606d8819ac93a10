"""Connections that broke while nobody looked, which aiokafka 0.14 on uvloop takes for a fault of its own.

Writing to a transport that a reset has closed raises OSError on asyncio's loop and RuntimeError on uvloop's. aiokafka expects the first.
The second ends whatever task was sending (the fetcher, the coordinator's, the producer's) for ever: the consumer lives and reads nothing
any more.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError


def tell_broken_connections() -> None:
    """From now on a write to a closed connection is a `KafkaConnectionError`, after which aiokafka connects anew. May be called twice."""
    usual = AIOKafkaConnection.send
    if hasattr(usual, "__wrapped__"):
        return

    @wraps(usual)
    def send(connection: AIOKafkaConnection, *arguments: Any, **keywords: Any) -> Any:
        try:
            return usual(connection, *arguments, **keywords)
        except RuntimeError as error:
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"Connection at {connection.host}:{connection.port} broken: {error}") from error

    AIOKafkaConnection.send = send
