"""`python -m tessera.bus.make_topics [tenant …]` makes and verifies every topic of the catalogue, and those of the tenants named."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts.errors import TesseraError


class TopicSettings(BaseSettings):
    """What `python -m tessera.bus.make_topics` reads: the common variables `TESSERA__KAFKA__…`."""

    model_config = SettingsConfigDict(env_prefix="TESSERA__", env_nested_delimiter="__", extra="ignore")

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)


def main(arguments: list[str] | None = None) -> int:
    """Makes all topics, and those of the tenants named as arguments. Exit code 0 when all are as wanted, else 1 (2 for wrong settings)."""
    tenants = sys.argv[1:] if arguments is None else arguments
    try:
        kafka = TopicSettings().kafka
        made = asyncio.run(ensure_all(kafka, tenants=tenants))
    except ValidationError as error:
        return _complain(2, f"settings: {error}")
    except TesseraError as error:
        return _complain(1, error.message)
    sys.stdout.write(f"topics ready on {kafka.bootstrap_servers}: {len(made)} made\n")
    return 0


def _complain(code: int, message: Any) -> int:
    sys.stderr.write(f"tessera.bus.make_topics: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
