"""Authentication, tenants and keys."""

import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from tessera.gateway.domain import errors, keys
from tessera.gateway.domain.audit import BOOTSTRAP, Actor
from tessera.gateway.domain.keys import ApiKey, OnDisconnect, Principal, StoredKey
from tessera.gateway.domain.limits import UNLIMITED, Allowance
from tessera.gateway.handlers.tokens import TokenAuthenticator
from tessera.gateway.ports import KeyDescription, Keys, Tenant, Tenants

CACHE_FOR = timedelta(seconds=5)
CACHED_KEYS = 10_000


class KeyCache:
    """Keys looked up within the last `CACHE_FOR`. Unknown ids are not kept, so a new key works at once. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, StoredKey]] = OrderedDict()

    def get(self, key_id: str) -> StoredKey | None:
        """None where it has to be looked up."""
        entry = self._entries.get(key_id)
        return entry[1] if entry and self._clock() < entry[0] else None

    def put(self, stored: StoredKey) -> None:
        """Keeps it for CACHE_FOR."""
        self.forget(stored.id)
        self._entries[stored.id] = (self._clock() + CACHE_FOR.total_seconds(), stored)
        while len(self._entries) > CACHED_KEYS:
            self._entries.popitem(last=False)

    def forget(self, key_id: str) -> None:
        """Has it looked up again."""
        self._entries.pop(key_id, None)


class Authenticator:
    """From a presented key, or access token where a provider is trusted, to a principal."""

    def __init__(self, store: Keys, pepper: bytes, tokens: TokenAuthenticator | None = None) -> None:
        self._store = store
        self._pepper = pepper
        self._tokens = tokens
        self._cache = KeyCache()
        self._used: dict[str, datetime] = {}

    async def principal(self, authorization: str | None) -> Principal:
        """Raises ApiError 401 for a header that is missing, malformed or not of a live key or token."""
        credential = _bearer(authorization)
        if self._tokens is not None and not credential.startswith(keys.PREFIX):
            return await self._tokens.principal(credential)
        presented = keys.parse(credential)
        if presented is None:
            raise errors.invalid_key()
        now = datetime.now(UTC)
        stored = self._cache.get(presented.id)
        if stored is None or not keys.matches(presented, stored, self._pepper, now):  # it may have been rotated elsewhere
            stored = await self._look_up(presented.id)
        if stored is None or not keys.matches(presented, stored, self._pepper, now) or not stored.usable(now):
            raise errors.invalid_key()
        self._used[stored.id] = now
        return Principal(stored.tenant_id, stored.id, stored.scopes, stored.allowance, stored.on_disconnect)

    def suspect(self, authorization: str | None) -> StoredKey | None:
        """The key that a header which was just refused names; None where there is no such key."""
        presented = keys.parse((authorization or "").partition(" ")[2].strip())
        return None if presented is None else self._cache.get(presented.id)

    def taken_uses(self) -> dict[str, datetime]:
        """When each key was last used since this was asked before."""
        used, self._used = self._used, {}
        return used

    def digest(self, secret: str) -> bytes:
        """What is kept of a new secret."""
        return keys.digest(secret, self._pepper)

    def forget(self, key_id: str) -> None:
        """This process asks the database again; others do so within CACHE_FOR."""
        self._cache.forget(key_id)

    async def _look_up(self, key_id: str) -> StoredKey | None:
        stored = await self._store.find(key_id)
        if stored is not None:
            self._cache.put(stored)
        return stored


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise errors.missing_key()
    scheme, _, credential = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise errors.missing_key()
    return credential.strip()


async def create_tenant(tenants: Tenants, tenant_id: str, name: str, by: Actor) -> Tenant:
    """Raises ApiError 409 `tenant_exists`."""
    tenant = Tenant(tenant_id, name, "active", datetime.now(UTC))
    if not await tenants.create(tenant, by):
        raise errors.ApiError(409, "tenant_exists", f"The tenant '{tenant_id}' exists already.", param="id")
    return tenant


async def create_key(
    tenants: Tenants,
    authenticator: Authenticator,
    by: Actor,
    *,
    tenant_id: str,
    name: str,
    environment: str,
    scopes: tuple[str, ...],
    expires_at: datetime | None,
    allowance: Allowance = UNLIMITED,
    on_disconnect: OnDisconnect | None = None,
) -> tuple[KeyDescription, ApiKey]:
    """A new key; the second part is shown once and kept nowhere. Raises ApiError 404 for a tenant that does not exist."""
    key = keys.generate(environment)
    description = KeyDescription(
        tenant_id, key.id, name, environment, scopes, datetime.now(UTC), expires_at, None, allowance, on_disconnect=on_disconnect
    )
    if not await tenants.add_key(description, authenticator.digest(key.secret), by):
        raise errors.not_found("tenant_not_found", f"The tenant '{tenant_id}'")
    return description, key


async def rotate_key(
    tenants: Tenants, authenticator: Authenticator, by: Actor, key_id: str, grace: timedelta
) -> tuple[KeyDescription, ApiKey]:
    """The key with another secret; the one it had goes on for `grace`, so that whoever holds it has time. Raises ApiError 404."""
    secret, now = keys.new_secret(), datetime.now(UTC)
    description = await tenants.rotate_key(key_id, authenticator.digest(secret), now, now + grace, by)
    authenticator.forget(key_id)
    if description is None:
        raise errors.not_found("key_not_found", f"The key '{key_id}', as one that opens something,")
    return description, ApiKey(description.environment, key_id, secret)


class LastUses:
    """Writes down when keys were used."""

    def __init__(self, tenants: Tenants, authenticator: Authenticator) -> None:
        self._tenants = tenants
        self._authenticator = authenticator
        self._waiting: dict[str, datetime] = {}

    async def once(self) -> None:
        """One update. What could not be written is written next time."""
        self._waiting |= self._authenticator.taken_uses()
        if self._waiting:
            await self._tenants.used_keys(self._waiting)
            self._waiting = {}


async def revoke_key(tenants: Tenants, authenticator: Authenticator, by: Actor, key_id: str) -> None:
    """Raises ApiError 404 `key_not_found`."""
    revoked = await tenants.revoke_key(key_id, datetime.now(UTC), by)
    authenticator.forget(key_id)
    if not revoked:
        raise errors.not_found("key_not_found", f"The key '{key_id}'")


async def bootstrap(tenants: Tenants, authenticator: Authenticator, tenant_id: str, key: ApiKey) -> None:
    """Makes the development tenant and its key with every scope. Safe to repeat, also by several replicas at once."""
    now = datetime.now(UTC)
    await tenants.create(Tenant(tenant_id, tenant_id, "active", now), BOOTSTRAP)
    description = KeyDescription(tenant_id, key.id, "development", key.environment, keys.SCOPES, now, None, None)
    await tenants.add_key(description, authenticator.digest(key.secret), BOOTSTRAP)
