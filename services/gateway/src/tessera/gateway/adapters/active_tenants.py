"""The look-up of a token's tenant in Postgres."""

from sqlalchemy import text

from tessera.storage import Database

_IS_ACTIVE = text("SELECT tenant_is_active(:tenant_id)")


class PostgresActiveTenants:
    """Implements `ports.ActiveTenants` with the other function that the authenticator may execute."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def is_active(self, tenant_id: str) -> bool:
        """One look-up."""
        async with self._database.authenticating() as connection:
            return bool((await connection.execute(_IS_ACTIVE, {"tenant_id": tenant_id})).scalar_one())
