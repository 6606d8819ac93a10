"""Alembic, one history per service, in the service's own schema; and what its revisions are written with.

`services/<name>/migrations/env.py` is two lines::

    from tessera.storage.migrations import run
    run("<name>")
"""

import asyncio
import importlib.util
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.contracts.errors import FatalError
from tessera.storage import delivery
from tessera.storage.connections import owner_engine
from tessera.storage.settings import PostgresSettings, postgres_settings, role_name

VERSION_TABLE = "alembic_version"

Privilege = Literal["select", "insert", "update", "delete"]


class Revision(Protocol):
    """What is used of `alembic.op`, in a form that the module itself fits."""

    @property
    def execute(self) -> Callable[[str], None]:
        """Runs one statement."""

    @property
    def get_context(self) -> Callable[[], MigrationContext]:
        """The run that is going on."""


_LOCK_WAIT = timedelta(minutes=10)


def run(service: str) -> None:
    """Body of a service's env.py: runs the revisions on the connection that `upgrade` handed over."""
    connection: Connection | None = context.config.attributes.get("connection")
    if connection is None:
        raise FatalError(f"run migrations with: python -m tessera.storage.migrate {service}")
    # One transaction per revision, so that one may leave it (CREATE INDEX CONCURRENTLY in an autocommit block).
    context.configure(connection=connection, version_table=VERSION_TABLE, version_table_schema=service, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


async def upgrade(service: str, settings: PostgresSettings | None = None, *, revision: str = "head") -> None:
    """Brings the service's schema to `revision`, as its owner. Two at once: the second waits, then finds nothing to do.

    Without `settings` they are read from the environment. Raises FatalError without a migrations folder, TimeoutError when another run
    holds the lock for ten minutes, and what Postgres raises.
    """
    config = configuration(service)
    engine = owner_engine(service, settings or postgres_settings(service))
    try:
        async with engine.connect() as connection:
            await _lock(connection, service)
            await connection.run_sync(_upgrade, config, revision)
            await _keep_versions_from_worker(connection, service)
    finally:
        await engine.dispose()


async def _lock(connection: AsyncConnection, service: str) -> None:
    # Polled, because a session that waits inside pg_advisory_lock holds a snapshot for which CREATE INDEX CONCURRENTLY would wait in turn.
    async with asyncio.timeout(_LOCK_WAIT.total_seconds()):
        while not await _try_lock(connection, service):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def _try_lock(connection: AsyncConnection, service: str) -> bool:
    taken = await connection.scalar(text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))"), {"name": f"tessera.migrate.{service}"})
    await connection.commit()
    return bool(taken)


def _upgrade(connection: Connection, config: Config, revision: str) -> None:
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


async def _keep_versions_from_worker(connection: AsyncConnection, service: str) -> None:
    worker, table = role_name(service, "worker"), f'"{service}".{VERSION_TABLE}'
    await connection.execute(text(f"REVOKE ALL ON {table} FROM {worker}"))
    await connection.execute(text(f"GRANT SELECT ON {table} TO {worker}"))
    await connection.commit()


def configuration(service: str) -> Config:
    """Alembic's configuration for a service, made without a file. Raises FatalError without a migrations folder."""
    config = Config()
    config.set_main_option("script_location", str(migrations_folder(service)).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def migrations_folder(service: str) -> Path:
    """`services/<service>/migrations` in a checkout, else `tessera/<service>/migrations` in an installed wheel; FatalError without both."""
    spec = importlib.util.find_spec(f"tessera.{service}")
    if spec is None or spec.origin is None:
        raise FatalError(f"the service {service!r} is not installed here")
    package = Path(spec.origin).parent
    for folder in (package / "migrations", package.parents[2] / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise FatalError(f"the service {service!r} has no migrations folder beside its package")


def service_of(op: Revision) -> str:
    """The service whose revision is running."""
    return str(op.get_context().opts["version_table_schema"])


def protect(op: Revision, table: str, *, client: Sequence[Privilege] = (), owner: bool = False) -> None:
    """Forces row-level security on a table that has a `tenant_id` (on the parent, where it has partitions: never grant on those).

    The worker sees all rows. The client role sees and writes rows of its transaction's tenant only, and gets just the privileges named in
    `client`. `owner=True` lets the owner's SECURITY DEFINER functions and back-fills see the rows; otherwise not even the owner does.
    """
    service = service_of(op)
    _force(op, table, service)
    if owner:
        op.execute(f"CREATE POLICY owner_all ON {table} TO {role_name(service, 'owner')} USING (true) WITH CHECK (true)")
    if client:
        mine = "tenant_id = NULLIF(current_setting('app.tenant', true), '')"
        op.execute(f"CREATE POLICY client_own_tenant ON {table} TO {role_name(service, 'client')} USING ({mine}) WITH CHECK ({mine})")
        op.execute(f"GRANT {', '.join(client)} ON {table} TO {role_name(service, 'client')}")


def _force(op: Revision, table: str, service: str) -> None:
    worker = role_name(service, "worker")
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY worker_all ON {table} TO {worker} USING (true) WITH CHECK (true)")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {worker}")


def create_delivery_tables(op: Revision) -> None:
    """The tables by which the bus makes effects happen once: see `tessera.storage.delivery`. For the worker role alone."""
    for statement in delivery.statements():
        op.execute(statement)
    for table in delivery.TABLES:
        _force(op, table, service_of(op))


def drop_delivery_tables(op: Revision) -> None:
    """Undoes `create_delivery_tables`."""
    for table in reversed(delivery.TABLES):
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP FUNCTION notify_outbox()")


def add_parked_events(op: Revision) -> None:
    """The table of events that came and were not applied, in place of the first `parked`: see `tessera.storage.delivery`."""
    for statement in delivery.parked_statements(role_name(service_of(op), "client")):
        op.execute(statement)
    _force(op, "parked", service_of(op))


def remove_parked_events(op: Revision) -> None:
    """Undoes `add_parked_events`."""
    for statement in delivery.first_parked_statements():
        op.execute(statement)
    _force(op, "parked", service_of(op))


_SHOWN = {
    # Other tenants' topics are none of a tenant's business.
    "consumer_position": "topic NOT LIKE 'ingest.%' OR topic = 'ingest.' || NULLIF(current_setting('app.tenant', true), '')",
    "inbox": "tenant_id = NULLIF(current_setting('app.tenant', true), '')",
}


def show_progress_to_client(op: Revision) -> None:
    """Lets the client role see how far the service's consumers are and which of its tenant's events were applied (docs/consistency.md)."""
    client = role_name(service_of(op), "client")
    for table, mine in _SHOWN.items():
        op.execute(f"CREATE POLICY client_own_tenant ON {table} FOR SELECT TO {client} USING ({mine})")
        op.execute(f"GRANT SELECT ON {table} TO {client}")


def hide_progress_from_client(op: Revision) -> None:
    """Undoes `show_progress_to_client`."""
    client = role_name(service_of(op), "client")
    for table in _SHOWN:
        op.execute(f"REVOKE SELECT ON {table} FROM {client}")  # noqa: S608  (names of our own)
        op.execute(f"DROP POLICY client_own_tenant ON {table}")
