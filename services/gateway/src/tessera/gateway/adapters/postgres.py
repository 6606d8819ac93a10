"""Tenants and keys in Postgres."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import RowMapping, text

from tessera.bus import Bus, Origin
from tessera.contracts import derived_id
from tessera.contracts.events import AuditAction, AuditRecorded, AuditTarget, TenantChanged
from tessera.gateway.adapters.audit import origin_of, put
from tessera.gateway.domain import audit
from tessera.gateway.domain.audit import Actor
from tessera.gateway.domain.keys import StoredKey
from tessera.gateway.domain.limits import Allowance
from tessera.gateway.domain.records import Since
from tessera.gateway.ports import Claim, KeyDescription, Tenant
from tessera.storage import Database

_FIND_KEY = text("""
    SELECT tenant_id, id, digest, scopes, expires_at, revoked_at, former_digest, former_until, limits, on_disconnect FROM find_key(:id)
""")
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
    INSERT INTO api_keys (tenant_id, id, name, environment, digest, scopes, created_at, expires_at, limits, on_disconnect)
    SELECT :tenant_id, :id, :name, :environment, :digest, :scopes, :created_at, :expires_at, CAST(:limits AS jsonb),
        CAST(:on_disconnect AS text)
    WHERE EXISTS (SELECT 1 FROM tenants WHERE tenant_id = :tenant_id)
    ON CONFLICT (id) DO UPDATE SET digest = excluded.digest, scopes = excluded.scopes
    WHERE api_keys.tenant_id = excluded.tenant_id AND (api_keys.digest, api_keys.scopes) IS DISTINCT FROM (excluded.digest, excluded.scopes)
""")
_KEY: Final = """tenant_id, id, name, environment, scopes, created_at, expires_at, revoked_at, former_until, last_used_at, limits,
    on_disconnect"""
_LIST_KEYS = text(f"SELECT {_KEY} FROM api_keys WHERE tenant_id = :tenant_id AND id > :after ORDER BY id LIMIT :limit")  # noqa: S608
_ROTATE_KEY = text(f"""
    UPDATE api_keys SET former_digest = digest, former_until = :former_until, digest = :digest
    WHERE id = :id AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > :now) RETURNING {_KEY}
""")  # noqa: S608
# In one order and past what another replica is writing, so that no two wait for each other.
_USED_KEYS = text("""
    UPDATE api_keys SET last_used_at = greatest(api_keys.last_used_at, used.at) FROM (
        SELECT key.tenant_id, key.id, given.at FROM unnest(CAST(:ids AS text[]), CAST(:moments AS timestamptz[])) AS given (id, at)
        JOIN api_keys key ON key.id = given.id ORDER BY key.id FOR NO KEY UPDATE OF key SKIP LOCKED
    ) AS used WHERE api_keys.tenant_id = used.tenant_id AND api_keys.id = used.id
""")
_REVOKE_KEY = text("UPDATE api_keys SET revoked_at = coalesce(revoked_at, :now) WHERE id = :id RETURNING tenant_id")


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
        fields: dict[str, Any] = dict(row)
        limits = fields.pop("limits")
        return StoredKey(**{**fields, "scopes": frozenset(row["scopes"])}, allowance=Allowance(**limits))


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

    async def claimed_at(self, tenant_id: str, generation_id: str) -> datetime | None:
        """One read."""
        async with self._database.reading(tenant_id) as connection:
            row = (await connection.execute(_CLAIMED, {"tenant_id": tenant_id, "id": generation_id})).mappings().one_or_none()
        return None if row is None else row["created_at"]


class PostgresTenants:
    """Implements `ports.Tenants`. The operator's view: it works across tenants, with the worker role."""

    def __init__(self, database: Database, bus: Bus) -> None:
        self._database = database
        self._bus = bus

    async def create(self, tenant: Tenant, by: Actor) -> bool:
        """Topics first: a tenant whose row is there can be written to at once. Making them again changes nothing."""
        await self._bus.ensure_tenant_topics(tenant.id)
        origin = Origin(tenant.id, str(derived_id(tenant.id, "created")), request_id=by.request_id)
        async with self._bus.transaction(origin) as transaction:
            added = await transaction.connection.execute(_ADD_TENANT, vars(tenant))
            if added.rowcount == 0:
                return False
            changed = TenantChanged(tenant=tenant.id, state="active", changed_at=tenant.created_at)
            await transaction.publish(changed, step="tenant", key=tenant.id.encode())
            target = AuditTarget(kind="tenant", id=tenant.id)
            await put(transaction, audit.record(by, "tenant.create", tenant_id=tenant.id, target=target))
        return True

    async def list(self, *, after: str | None, limit: int) -> Sequence[Tenant]:
        """By id, those after `after`."""
        async with self._database.transaction() as connection:
            rows = await connection.execute(_LIST_TENANTS, {"after": after or "", "limit": limit})
        return [Tenant(**row) for row in rows.mappings()]

    async def add_key(self, description: KeyDescription, digest: bytes, by: Actor) -> bool:
        """The same id again is the development key: unchanged, or after a change of the pepper hashed anew."""
        values = {**vars(description), "scopes": list(description.scopes), "digest": digest}
        for given_later in ("revoked_at", "former_until", "last_used_at"):
            values.pop(given_later)
        values["limits"] = json.dumps(values.pop("allowance").said())
        async with self._bus.transaction(origin_of(description.tenant_id, by.request_id)) as transaction:
            added = await transaction.connection.execute(_ADD_KEY, values)
            if added.rowcount == 0:
                return False
            await put(
                transaction, _key_act(by, "key.create", description.tenant_id, description.id, {"scopes": " ".join(description.scopes)})
            )
        return True

    async def list_keys(self, tenant_id: str, *, after: str | None, limit: int) -> Sequence[KeyDescription]:
        """A tenant's keys by id, revoked ones included."""
        async with self._database.transaction() as connection:
            rows = await connection.execute(_LIST_KEYS, {"tenant_id": tenant_id, "after": after or "", "limit": limit})
        return [_description(row) for row in rows.mappings()]

    async def rotate_key(self, key_id: str, digest: bytes, now: datetime, former_until: datetime, by: Actor) -> KeyDescription | None:
        """One update."""
        values = {"id": key_id, "digest": digest, "now": now, "former_until": former_until}
        async with self._bus.transaction(origin_of(by.tenant_id, by.request_id)) as transaction:
            row = (await transaction.connection.execute(_ROTATE_KEY, values)).mappings().one_or_none()
            if row is None:
                return None
            rotated = _description(row)
            await put(transaction, _key_act(by, "key.rotate", rotated.tenant_id, key_id, {"former_until": former_until.isoformat()}))
        return rotated

    async def used_keys(self, moments: Mapping[str, datetime]) -> None:
        """One update. A row that another replica is writing is left to it."""
        async with self._database.transaction() as connection:
            await connection.execute(_USED_KEYS, {"ids": list(moments), "moments": list(moments.values())})

    async def revoke_key(self, key_id: str, now: datetime, by: Actor) -> bool:
        """False where no such key exists; revoking twice keeps the first moment."""
        async with self._bus.transaction(origin_of(by.tenant_id, by.request_id)) as transaction:
            tenant_id = await transaction.connection.scalar(_REVOKE_KEY, {"id": key_id, "now": now})
            if tenant_id is None:
                return False
            await put(transaction, _key_act(by, "key.revoke", tenant_id, key_id))
        return True


def _description(row: RowMapping) -> KeyDescription:
    fields: dict[str, Any] = dict(row)
    limits = fields.pop("limits")
    return KeyDescription(**{**fields, "scopes": tuple(row["scopes"])}, allowance=Allowance(**limits))


def _key_act(by: Actor, action: AuditAction, tenant_id: str, key_id: str, details: Mapping[str, str] | None = None) -> AuditRecorded:
    return audit.record(by, action, tenant_id=tenant_id, target=AuditTarget(kind="key", id=key_id), details=details)
