"""How a connection to Postgres is opened: address, role, TLS and session settings, for every way in which Tessera uses asyncpg."""

import ssl
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tessera.storage.settings import PostgresSettings, PostgresTls, Role, role_name


def connect_arguments(service: str, role: Role, settings: PostgresSettings) -> dict[str, Any]:
    """Arguments of `asyncpg.connect` for a role of a service. Raises ValueError when the role's password is not set.

    Session settings go with the log-in (`server_settings`), never by SET: a pool's reset would silently undo those.
    """
    return {
        "host": settings.host,
        "port": settings.port,
        "database": settings.database,
        "user": role_name(service, role),
        "password": settings.password(role).get_secret_value(),
        "timeout": settings.connect_timeout_seconds,
        "statement_cache_size": settings.statement_cache_size,
        "command_timeout": None if role == "owner" else settings.statement_timeout_seconds + settings.answer_grace_seconds,
        "ssl": _ssl(settings.tls),
        "server_settings": _session(service, role, settings),
    }


def _session(service: str, role: Role, settings: PostgresSettings) -> dict[str, str]:
    common = {"application_name": f"tessera-{service}-{role}", "search_path": f'"{service}", public', "timezone": "UTC", "jit": "off"}
    if role == "owner":
        return {**common, "lock_timeout": "30s"}  # migrations may take long, but must not queue everyone behind them
    return {
        **common,
        "statement_timeout": _milliseconds(settings.statement_timeout_seconds),
        "idle_in_transaction_session_timeout": _milliseconds(settings.idle_in_transaction_timeout_seconds),
    }


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))


def _ssl(tls: PostgresTls) -> ssl.SSLContext | str:
    if tls.mode in ("disable", "prefer"):
        return tls.mode
    verify = tls.mode != "require" or tls.ca_file is not None  # as libpq does
    return tls.context(verify=verify, check_hostname=tls.mode == "verify-full")


async def connect(service: str, role: Role, settings: PostgresSettings) -> asyncpg.Connection:
    """A connection of its own, outside any pool; the caller closes it. Raises OSError, TimeoutError or asyncpg's errors."""
    return await asyncpg.connect(**connect_arguments(service, role, settings))


def owner_engine(service: str, settings: PostgresSettings) -> AsyncEngine:
    """An engine for migrations: the owner's role, no pool."""
    arguments = connect_arguments(service, "owner", settings)
    return create_async_engine("postgresql+asyncpg://", connect_args=arguments, poolclass=NullPool, hide_parameters=True)
