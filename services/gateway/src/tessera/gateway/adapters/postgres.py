"""Tenants and keys in Postgres."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import text

from tessera.bus import Bus, Origin
from tessera.contracts import derived_id
from tessera.contracts.events import TenantChanged
from tessera.gateway.domain.keys import StoredKey
from tessera.gateway.ports import Claim, KeyDescription, Since, Tenant
from tessera.storage import Database

_FIND_KEY = text("SELECT tenant_id, id, digest, scopes, expires_at, revoked_at FROM find_key(:id)")
_CLAIM = text("""
    INSERT INTO generations (tenant_id, id, body_digest, reply_partition, reply_offset)
    VALUES (:tenant_id, :id, :digest, :partition, :offset) ON CONFLICT DO NOTHING
""")
_CLAIMED = text("SELECT body_digest, reply_partition, reply_offset, created_at FROM generations WHERE tenant_id = :tenant_id AND id = :id")
_LIST_TENANTS = text("""
    SELECT tenant_id AS id, name, state, created_at FROM tenants WHERE tenant_id > :after ORDER BY tenant_id LIMIT :limit
""")
_ADD_TENANT = text("""
    INSERT INTO tenants (tenant_id, name, state, created_at) VALUES (:id, :name, :state, :created_at) ON CONFLICT DO NOTHING
""")
_ADD_KEY = text("""
    INSERT INTO api_keys (tenant_id, id, name, environment, digest, scopes, created_at, expires_at)
    SELECT :tenant_id, :id, :name, :environment, :digest, :scopes, :created_at, :expires_at
    WHERE EXISTS (SELECT 1 FROM tenants WHERE tenant_id = :tenant_id)
    ON CONFLICT (id) DO UPDATE SET digest = excluded.digest, scopes = excluded.scopes WHERE api_keys.tenant_id = excluded.tenant_id
""")
_LIST_KEYS = text("""
    SELECT tenant_id, id, name, environment, scopes, created_at, expires_at, revoked_at FROM api_keys
    WHERE tenant_id = :tenant_id AND id > :after ORDER BY id LIMIT :limit
""")
_REVOKE_KEY = text("UPDATE api_keys SET revoked_at = coalesce(revoked_at, :now) WHERE id = :id")


class PostgresKeys:
    """Implements `ports.Keys` with the one function that the authenticator may execute."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, key_id: str) -> StoredKey | None:
        """The key by its public id, of whichever active tenant."""
        async with self._database.authenticating() as connection:
            row = (await connection.execute(_FIND_KEY, {"id": key_id})).mappings().one_or_none()
        if row is None:
            return None
        return StoredKey(row["tenant_id"], row["id"], row["digest"], frozenset(row["scopes"]), row["expires_at"], row["revoked_at"])


class PostgresGenerations:
    """Implements `ports.Generations`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, tenant_id: str, generation_id: str, body_digest: bytes, since: Since) -> Claim:
        """Writes the row, or finds the one that is there."""
        values = {"tenant_id": tenant_id, "id": generation_id, "digest": body_digest, "partition": since.partition, "offset": since.offset}
        async with self._database.writing(tenant_id) as connection:
            written = await connection.execute(_CLAIM, values)
            row = (await connection.execute(_CLAIMED, {"tenant_id": tenant_id, "id": generation_id})).mappings().one()
        place = Since(row["reply_partition"], row["reply_offset"])
        return Claim(written.rowcount == 1, row["body_digest"] == body_digest, place, row["created_at"])


class PostgresTenants:
    """Implements `ports.Tenants`. The operator's view: it works across tenants, with the worker role."""

    def __init__(self, database: Database, bus: Bus) -> None:
        self._database = database
        self._bus = bus

    async def create(self, tenant: Tenant, request_id: str | None) -> bool:
        """Topics first: a tenant whose row is there can be written to at once. Making them again changes nothing."""
        await self._bus.ensure_tenant_topics(tenant.id)
        origin = Origin(tenant.id, str(derived_id(tenant.id, "created")), request_id=request_id)
        async with self._bus.transaction(origin) as transaction:
            added = await transaction.connection.execute(_ADD_TENANT, vars(tenant))
            if added.rowcount == 0:
                return False
            changed = TenantChanged(tenant=tenant.id, state="active", changed_at=tenant.created_at)
            await transaction.publish(changed, step="tenant", key=tenant.id.encode())
        return True

    async def list(self, *, after: str | None, limit: int) -> Sequence[Tenant]:
        """By id, those after `after`."""
        async with self._database.transaction() as connection:
            rows = await connection.execute(_LIST_TENANTS, {"after": after or "", "limit": limit})
        return [Tenant(**row) for row in rows.mappings()]

    async def add_key(self, description: KeyDescription, digest: bytes) -> bool:
        """False where the tenant does not exist. The same id again (the development key, after a change of the pepper) is hashed anew."""
        values = {**vars(description), "scopes": list(description.scopes), "digest": digest}
        values.pop("revoked_at")
        async with self._database.transaction() as connection:
            added = await connection.execute(_ADD_KEY, values)
        return added.rowcount == 1

    async def list_keys(self, tenant_id: str, *, after: str | None, limit: int) -> Sequence[KeyDescription]:
        """A tenant's keys by id, revoked ones included."""
        async with self._database.transaction() as connection:
            rows = await connection.execute(_LIST_KEYS, {"tenant_id": tenant_id, "after": after or "", "limit": limit})
        return [KeyDescription(**{**row, "scopes": tuple(row["scopes"])}) for row in rows.mappings()]

    async def revoke_key(self, key_id: str, now: datetime) -> bool:
        """False where no such key exists; revoking twice keeps the first moment."""
        async with self._database.transaction() as connection:
            revoked = await connection.execute(_REVOKE_KEY, {"id": key_id, "now": now})
        return revoked.rowcount == 1
