"""The same three servers in containers, for machines with a Docker engine and without Java or the packaged binaries."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

KAFKA_IMAGE = "confluentinc/cp-kafka:8.1.0"
POSTGRES_IMAGE = "pgvector/pgvector:0.8.5-pg18"
REDIS_IMAGE = "redis:7"
_ENGINE_TIMEOUT_SECONDS = 10


def engine_answers() -> bool:
    """Whether a Docker engine runs here; the command alone is not enough."""
    program = shutil.which("docker")
    if program is None:
        return False
    try:
        return subprocess.run([program, "info"], capture_output=True, check=False, timeout=_ENGINE_TIMEOUT_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@contextmanager
def kafka() -> Iterator[str]:
    """Bootstrap servers of a Kafka that lives as long as the context."""
    from testcontainers.community.kafka import KafkaContainer  # noqa: PLC0415 - only where it is needed

    with KafkaContainer(KAFKA_IMAGE).with_kraft() as container:
        yield container.get_bootstrap_server()


@contextmanager
def postgres() -> Iterator[str]:
    """Administrator's address of a Postgres with pgvector that lives as long as the context."""
    from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415 - only where it is needed

    with PostgresContainer(POSTGRES_IMAGE, driver=None) as container:
        yield container.get_connection_url()


@contextmanager
def redis() -> Iterator[str]:
    """Address of a Redis that lives as long as the context."""
    from testcontainers.community.redis import RedisContainer  # noqa: PLC0415 - only where it is needed

    with RedisContainer(REDIS_IMAGE) as container:
        yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(container.port)}/0"
