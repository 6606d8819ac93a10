"""Postgres with roles and tenancy, migrations, the object store and the Redis client."""

from tessera.storage.database import Database
from tessera.storage.direct import DirectStatement, driver_of
from tessera.storage.errors import (
    ObjectNotFoundError,
    ObjectsUnavailableError,
    StorageConflictError,
    StorageTimeoutError,
    StorageUnavailableError,
)
from tessera.storage.leases import LeasedRows
from tessera.storage.objects import ObjectStat, ObjectStore
from tessera.storage.redis import redis_client
from tessera.storage.settings import ObjectStoreSettings, PostgresSettings, PostgresTls, RedisSettings, Role, role_name
from tessera.storage.tls import ListenerTls, TlsFiles

__all__ = [
    "Database",
    "DirectStatement",
    "LeasedRows",
    "ListenerTls",
    "ObjectNotFoundError",
    "ObjectStat",
    "ObjectStore",
    "ObjectStoreSettings",
    "ObjectsUnavailableError",
    "PostgresSettings",
    "PostgresTls",
    "RedisSettings",
    "Role",
    "StorageConflictError",
    "StorageTimeoutError",
    "StorageUnavailableError",
    "TlsFiles",
    "driver_of",
    "redis_client",
    "role_name",
]
