"""`python -m tessera.gateway.operator_key TENANT` makes a key with every scope and shows it once.

For production, where the bootstrap key is refused: it runs beside the gateway with the gateway's own settings, and whoever can
read those may do this anyway. The tenant is made where it does not exist.
"""

import asyncio
import sys
from contextlib import suppress

from pydantic import TypeAdapter, ValidationError

from tessera.bus import Bus
from tessera.contracts.base import TenantId
from tessera.contracts.errors import FatalError
from tessera.gateway.adapters.postgres import PostgresKeys, PostgresTenants
from tessera.gateway.domain import keys
from tessera.gateway.domain.audit import OPERATOR_KEY
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.access import Authenticator, create_key, create_tenant
from tessera.gateway.settings import GatewaySettings
from tessera.storage import Database


async def make(settings: GatewaySettings, tenant_id: str) -> str:
    """The new key. Raises what Postgres or Kafka raise when they cannot be reached."""
    database = Database(settings.service, settings.postgres)
    bus = Bus(settings, database, on_fatal=_fatal)
    await bus.connect()
    await bus.start()
    try:
        tenants = PostgresTenants(database, bus)
        with suppress(ApiError):  # it exists already
            await create_tenant(tenants, tenant_id, tenant_id, OPERATOR_KEY)
        authenticator = Authenticator(PostgresKeys(database), settings.pepper)
        _, key = await create_key(
            tenants,
            authenticator,
            OPERATOR_KEY,
            tenant_id=tenant_id,
            name="operator",
            environment=settings.key_environment,
            scopes=keys.SCOPES,
            expires_at=None,
        )
        return key.reveal()
    finally:
        await bus.stop()
        await database.close()


def _fatal(error: FatalError) -> None:
    raise error


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    try:
        tenant_id = TypeAdapter(TenantId).validate_python(arguments[0])
    except (IndexError, ValidationError):
        sys.stderr.write("Say whose key: python -m tessera.gateway.operator_key TENANT (lower-case letters, digits, - and _)\n")
        return 2
    sys.stdout.write(asyncio.run(make(GatewaySettings(), tenant_id)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
