"""The Redis client, with patience that fits what Redis is used for."""

import ssl
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tessera.storage.settings import RedisSettings


def redis_client(settings: RedisSettings) -> Redis:
    """A client that connects on first use and speaks bytes; close it with `aclose()`.

    A command fails after `timeout_seconds`, tried `retries` times more; the library's own default blocks half a minute on a black hole.
    """
    pool = ConnectionPool.from_url(
        settings.url,
        username=settings.username,
        password=settings.password.get_secret_value() if settings.password else None,
        socket_timeout=settings.timeout_seconds,
        socket_connect_timeout=settings.connect_timeout_seconds,
        max_connections=settings.max_connections,
        retry=Retry(ConstantBackoff(0.02), settings.retries),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
        health_check_interval=15,
    )
    if pool.connection_class is Connection:
        pool.connection_class = _PlainConnection
    if settings.is_encrypted:
        pool.connection_class = _EncryptedConnection
        pool.connection_kwargs["context"] = settings.tls.context()
    return Redis.from_pool(pool)


class _Telling(AbstractConnection):  # type: ignore[misc, unused-ignore]
    """Writing to a connection that a reset has closed is RuntimeError on uvloop's loop; the library expects OSError, as on asyncio's."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """As the library's, which has disconnected by the time that it raises."""
        try:
            await super().send_packed_command(command, check_health)
        except RuntimeError as error:
            raise RedisConnectionError(f"The connection broke: {error}") from error


class _PlainConnection(_Telling, Connection):  # type: ignore[misc, unused-ignore]
    """Over TCP."""


class _EncryptedConnection(_Telling, SSLConnection):  # type: ignore[misc, unused-ignore]
    """Uses our context: the library's own trusts the system's authorities beside the given one, and never looks at the files again."""

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = context
