"""`python -m tessera.storage.bootstrap`: makes the database, the roles, the schemas and the vector extension.

Idempotent, and safe when two run at once. Needs a superuser (TESSERA_ADMIN_DATABASE_URL, else DATABASE_URL) and the passwords of the roles
(`TESSERA_<SERVICE>__POSTGRES__…_PASSWORD`, or `TESSERA__POSTGRES__…_PASSWORD` for all services alike).
"""

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from pydantic import SecretStr, ValidationError

from tessera.contracts.errors import FatalError
from tessera.storage.problems import explained
from tessera.storage.scram import verifier
from tessera.storage.settings import SERVICES, PostgresSettings, Role, postgres_settings, role_name

MINIMUM_SERVER = 170000  # transaction_timeout came with 17

_LOCK = "tessera.bootstrap"
_ROLES: tuple[Role, ...] = ("owner", "worker", "client")


async def bootstrap(admin_url: SecretStr, services: Mapping[str, PostgresSettings]) -> None:
    """Makes everything that migrations need, for each service in the database its settings name, or brings it up to date (passwords too).

    `admin_url` is a libpq address of a superuser; the lock against a second run is taken in its database. Raises FatalError for a server
    that is too old or lacks pgvector, ValueError for a missing or non-ASCII password, OSError or asyncpg's errors otherwise.
    """
    async with _administrator(admin_url) as admin, _locked(admin):
        await _require_version(admin)
        for service, settings in services.items():
            await _make_roles(admin, service, settings)
        for database in sorted({settings.database for settings in services.values()}):
            await _make_database(admin, database)
            async with _administrator(_in_database(admin_url, database)) as inside:
                await _fill_database(inside, database, {name: given for name, given in services.items() if given.database == database})


@asynccontextmanager
async def _administrator(url: SecretStr) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url.get_secret_value(), timeout=10, statement_cache_size=0)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _locked(admin: asyncpg.Connection) -> AsyncIterator[None]:
    await admin.execute("SELECT pg_advisory_lock(hashtextextended($1, 0))", _LOCK)
    yield  # the lock ends with the session


def _in_database(url: SecretStr, database: str) -> SecretStr:
    return SecretStr(urlunsplit(urlsplit(url.get_secret_value())._replace(path=f"/{database}")))


async def _require_version(admin: asyncpg.Connection) -> None:
    version = int(await admin.fetchval("SELECT current_setting('server_version_num')"))
    if version < MINIMUM_SERVER:
        raise FatalError(f"Postgres {MINIMUM_SERVER // 10000} or newer is needed; this one is {version // 10000}")


def _roles(settings: PostgresSettings) -> tuple[Role, ...]:
    return _ROLES if settings.authenticator_password is None else (*_ROLES, "authenticator")


async def _make_roles(admin: asyncpg.Connection, service: str, settings: PostgresSettings) -> None:
    for role in _roles(settings):
        name = role_name(service, role)
        if not await admin.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", name):
            await admin.execute(f"CREATE ROLE {name}")
        # Postgres gets the verifier, so that no log or statistics view of the server ever holds the password.
        secret = verifier(settings.password(role).get_secret_value())
        await admin.execute(
            f"ALTER ROLE {name} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE NOREPLICATION NOINHERIT PASSWORD '{secret}'"
        )


async def _make_database(admin: asyncpg.Connection, database: str) -> None:
    if not await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", database):
        await admin.execute(f"CREATE DATABASE \"{database}\" TEMPLATE template0 ENCODING 'UTF8'")


async def _fill_database(inside: asyncpg.Connection, database: str, services: Mapping[str, PostgresSettings]) -> None:
    await _make_extension(inside)
    async with inside.transaction():
        for statement in _closed(database):
            await inside.execute(statement)
        for service, settings in services.items():
            for statement in _service_statements(database, service, settings):
                await inside.execute(statement)


async def _make_extension(inside: asyncpg.Connection) -> None:
    if not await inside.fetchval("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"):
        raise FatalError("this Postgres server does not have pgvector; install it there and run this again")
    await inside.execute("CREATE EXTENSION IF NOT EXISTS vector SCHEMA public")


def _closed(database: str) -> Iterator[str]:
    yield f'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC'
    yield "REVOKE CREATE ON SCHEMA public FROM PUBLIC"


def _service_statements(database: str, service: str, settings: PostgresSettings) -> Iterator[str]:
    owner, worker = role_name(service, "owner"), role_name(service, "worker")
    everyone = ", ".join(role_name(service, role) for role in _roles(settings))
    yield f'GRANT CONNECT ON DATABASE "{database}" TO {everyone}'
    yield f'CREATE SCHEMA IF NOT EXISTS "{service}" AUTHORIZATION {owner}'
    yield f'REVOKE ALL ON SCHEMA "{service}" FROM PUBLIC'
    yield f'GRANT USAGE ON SCHEMA "{service}" TO {everyone}'
    default = f'ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA "{service}"'
    yield f"{default} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {worker}"
    yield f"{default} GRANT USAGE, SELECT ON SEQUENCES TO {worker}"
    yield f"{default} GRANT EXECUTE ON FUNCTIONS TO {worker}"
    # Every new function could be executed by everyone otherwise; this default cannot be taken back per schema.
    yield f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"
    milliseconds = round(settings.transaction_timeout_seconds * 1000)
    for role in [role_name(service, role) for role in _roles(settings) if role != "owner"]:
        yield f"ALTER ROLE {role} IN DATABASE \"{database}\" SET transaction_timeout = '{milliseconds}'"


def _admin_url(environment: Mapping[str, str]) -> SecretStr:
    for name in ("TESSERA_ADMIN_DATABASE_URL", "DATABASE_URL"):
        if environment.get(name):
            return SecretStr(environment[name])
    raise ValueError(
        "set TESSERA_ADMIN_DATABASE_URL (or DATABASE_URL) to the address of a superuser, postgresql://user:password@host:port/postgres"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when everything is there, 1 when Postgres refused, 2 when settings are missing or wrong."""
    parser = argparse.ArgumentParser(prog="python -m tessera.storage.bootstrap", description="Make database, roles, schemas and extension.")
    parser.add_argument("services", nargs="*", metavar="SERVICE", default=list(SERVICES), help="default: all six")
    names: list[str] = parser.parse_args(arguments).services
    try:
        asyncio.run(bootstrap(_admin_url(os.environ), {service: postgres_settings(service) for service in names}))
    except (ValidationError, ValueError, FatalError) as error:
        sys.stderr.write(f"bootstrap: {explained(error)}\n")
        return 2
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        sys.stderr.write(f"bootstrap: {explained(error)}\n")
        return 1
    sys.stdout.write(f"bootstrap: ready for {', '.join(names)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
