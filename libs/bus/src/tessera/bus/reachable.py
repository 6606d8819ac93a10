"""`python -m tessera.bus.reachable` says whether the Kafka of `TESSERA__KAFKA__…` answers, over TLS and with a log-in where that is set."""

from __future__ import annotations

import asyncio
import sys

from aiokafka.errors import KafkaConnectionError
from pydantic import ValidationError

from tessera.bus.make_topics import TopicSettings
from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import TopicDirectory
from tessera.contracts.errors import RetryableError, TesseraError


async def reach(kafka: KafkaSettings) -> None:
    """Returns when a broker has answered. Raises RetryableError when none does, or when it refuses who asks."""
    directory = TopicDirectory(kafka, "tessera-reachable")
    try:
        await directory.start()
    except RetryableError as error:
        if isinstance(error.__cause__, KafkaConnectionError | ConnectionError):
            raise RetryableError(f"no Kafka answers at {kafka.bootstrap_servers}: {error.__cause__!r}", code=error.code) from error
        raise
    await directory.stop()


def main() -> int:
    """Exit code 0 when it answers, 1 when not, 2 for wrong settings."""
    try:
        asyncio.run(reach(TopicSettings().kafka))
    except (ValidationError, ValueError) as error:
        return _complain(2, f"settings: {error}")
    except TesseraError as error:
        return _complain(1, error.message)
    return 0


def _complain(code: int, message: object) -> int:
    sys.stderr.write(f"tessera.bus.reachable: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
