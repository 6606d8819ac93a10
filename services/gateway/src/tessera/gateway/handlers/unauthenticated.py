"""Development without keys: every request is one tenant's."""

from datetime import UTC, datetime
from typing import Final

from tessera.gateway.domain import keys
from tessera.gateway.domain.audit import BOOTSTRAP
from tessera.gateway.domain.keys import Principal
from tessera.gateway.handlers.access import Authenticator
from tessera.gateway.ports import Keys, Tenant, Tenants

KEY_ID: Final = "unauthenticated"
"""Stands where the id of the key would: in log lines and limits."""


class Unauthenticated(Authenticator):
    """Takes everybody for one tenant, whatever key is shown, with every scope but the operator's.

    An operator makes keys, which would open the platform after authentication is on again, and sees what is every tenant's: for those
    endpoints there is no tenant to be fixed to.
    """

    def __init__(self, store: Keys, pepper: bytes, tenant_id: str) -> None:
        super().__init__(store, pepper)
        self._everybody = Principal(tenant_id, KEY_ID, frozenset(keys.DEFAULT_SCOPES))

    async def principal(self, authorization: str | None) -> Principal:
        """Never raises."""
        return self._everybody


async def make_tenant(tenants: Tenants, tenant_id: str) -> None:
    """Makes the tenant unless it exists. Safe to repeat, also by several replicas at once."""
    await tenants.create(Tenant(tenant_id, tenant_id, "active", datetime.now(UTC)), BOOTSTRAP)
