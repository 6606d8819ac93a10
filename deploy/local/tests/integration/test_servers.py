"""Kafka, Postgres and Redis from the local recipes survive what happens to servers."""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from confluent_kafka.admin import AdminClient
from redis import Redis as Client

from tessera.local.errors import NotReadyError
from tessera.local.kafka import Kafka, KafkaDistribution, KafkaLimits, cached_distribution
from tessera.local.ports import free_ports
from tessera.local.postgres import Postgres
from tessera.local.redis import Redis, redis_answers
from tessera.testkit import create_topics

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tessera servers ") as made:
        yield Path(made)


def _kafka(folder: Path) -> Kafka:
    ports = free_ports(("broker", "controller"))
    distribution = cached_distribution()
    distribution.ensure()
    return Kafka(folder / "kafka", ports["broker"], ports["controller"], distribution, KafkaLimits(heap_megabytes=256))


def test_kafkas_classes_come_from_the_archive_also_where_the_cache_is_a_link(folder: Path) -> None:
    """Java says nothing when it refuses an archive; it only starts later."""
    (folder / "link").symlink_to(cached_distribution().folder)
    distribution = KafkaDistribution(folder / "link")
    distribution.ensure()
    command = distribution.java(f"-XX:SharedArchiveFile={distribution.archive}", "-Xlog:class+load", "kafka.Kafka")
    loaded = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    (line,) = [line for line in loaded.splitlines() if " kafka.Kafka " in line]
    assert line.endswith("source: shared objects file (top)")


def _topics(kafka: Kafka) -> set[str]:
    return set(AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=10).topics)


def test_kafka_keeps_its_topics_over_a_kill_and_a_change_of_ports(folder: Path) -> None:
    first = _kafka(folder)
    try:
        first.start()
        first.wait_ready()
        create_topics(first.bootstrap_servers, "kept")
    finally:
        first.kill()
    second = _kafka(folder)
    try:
        second.start()
        second.wait_ready()
        assert "kept" in _topics(second)
        third = _kafka(folder)
        third.starts_allowed = 1
        third.start()
        with pytest.raises(NotReadyError, match=r"another process holds .*node\.lock"):
            third.wait_ready(20)
        assert "kept" in _topics(second)
    finally:
        second.stop()


async def _execute(postgres: Postgres, statement: str) -> object:
    connection = await asyncpg.connect(postgres.database_url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def test_postgres_keeps_its_rows_over_a_kill(folder: Path) -> None:
    # As root the folder above is closed to the user that Postgres runs as, like a checkout under /root.
    postgres = Postgres(folder / "postgres", free_ports(("postgres",))["postgres"], "password")
    try:
        postgres.start()
        postgres.wait_ready()
        asyncio.run(_execute(postgres, "create table kept as select 1"))
        postgres.kill()
        postgres.start()
        postgres.wait_ready()
        assert asyncio.run(_execute(postgres, "select count(*) from kept")) == 1
        owner = (folder / "postgres" / "data").owner()
        assert owner == ("nobody" if os.geteuid() == 0 else Path(folder).owner())
    finally:
        postgres.stop()


def test_a_half_made_postgres_is_made_again(folder: Path) -> None:
    postgres = Postgres(folder / "postgres", free_ports(("postgres",))["postgres"], "password", durable=False)
    postgres.prepare()
    (folder / "postgres" / "initialising").touch()
    (folder / "postgres" / "data" / "global" / "pg_control").unlink()
    try:
        postgres.start()
        postgres.wait_ready()
    finally:
        postgres.stop()


def test_redis_asks_for_its_password_and_writes_no_data(folder: Path) -> None:
    redis = Redis(folder / "redis", free_ports(("redis",))["redis"], "password")
    try:
        redis.start()
        redis.wait_ready()
        with Client.from_url(redis.redis_url, retry=None) as client:
            client.set("key", b"value")
        assert not redis_answers(redis.redis_url.replace("password", "wrong"))
    finally:
        redis.stop()
    assert sorted(file.name for file in (folder / "redis").iterdir()) == ["node.lock", "redis.conf", "redis.log"]
