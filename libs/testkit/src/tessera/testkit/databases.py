"""A fresh Postgres database for a test module, with the roles, schemas and migrations of the services that it asks for."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
from pydantic import SecretStr

from tessera.local.environment import ALL_ROLES, Addresses, common_environment, password_environment
from tessera.local.processes import run_apart
from tessera.storage.bootstrap import bootstrap
from tessera.storage.migrations import upgrade
from tessera.storage.settings import PostgresSettings, postgres_settings
from tessera.testkit.stack import Stack


@dataclass(frozen=True)
class PostgresDatabase:
    """One database. Roles belong to the server and have the same passwords in every test database."""

    stack: Stack
    name: str
    services: tuple[str, ...]

    def settings(self, service: str) -> PostgresSettings:
        """What `Database(service, …)` takes, with the passwords of all roles."""
        return postgres_settings(service, self.environment(service))

    def environment(self, service: str) -> dict[str, str]:
        """The variables by which a process of the service finds this database."""
        addresses = Addresses(self.stack.kafka_bootstrap_servers, self.stack.database_url, self.stack.redis_url)
        everything = common_environment(addresses, self.stack.folder, self.name) | password_environment(service, _password, ALL_ROLES)
        return {name: value for name, value in everything.items() if "__POSTGRES__" in name}

    @property
    def admin_url(self) -> str:
        """The administrator in this database: sees all rows; for assertions only."""
        return self.stack.database_url.rpartition("/")[0] + f"/{self.name}"

    def migrate(self) -> None:
        """Make roles, schemas and tables. Blocks."""
        run_apart(bootstrap(SecretStr(self.stack.database_url), {service: self.settings(service) for service in self.services}))
        for service in self.services:
            run_apart(upgrade(service, self.settings(service)))

    def drop(self) -> None:
        """Remove the database; its connections are ended."""
        run_apart(_drop(self.stack.database_url, self.name))


def new_database(stack: Stack, services: Sequence[str]) -> PostgresDatabase:
    """A fresh, migrated database; the caller drops it."""
    database = PostgresDatabase(stack, f"test_{secrets.token_hex(6)}", tuple(services))
    try:
        database.migrate()
    except BaseException:
        database.drop()
        raise
    return database


def _password(role: str) -> str:
    return f"only-for-tests-{role}"


async def _drop(database_url: str, name: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    finally:
        await connection.close()
