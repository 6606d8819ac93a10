"""`python -m tessera.storage.migrate SERVICE…`: brings the schemas of the services to their newest revision, as their owners."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

import asyncpg
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from tessera.contracts.errors import FatalError
from tessera.storage.migrations import upgrade
from tessera.storage.problems import explained

_UNKNOWN_REVISION = "Can't locate revision"
_NEWER = ". A newer version of Tessera made this database: run that version, or restore a back-up from before it."


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every schema is at its newest revision, 1 when Postgres refused, 2 when settings are missing or wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tessera.storage.migrate", description="Upgrade the schemas of services to their newest revision."
    )
    parser.add_argument("services", nargs="+", metavar="SERVICE")
    for service in parser.parse_args(arguments).services:
        code = _migrated(service)
        if code:
            return code
    return 0


def _migrated(service: str) -> int:
    try:
        asyncio.run(upgrade(service))
    except (ValidationError, ValueError, FatalError) as error:
        sys.stderr.write(f"migrate {service}: {explained(error)}\n")
        return 2
    except (OSError, TimeoutError, SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, CommandError) as error:
        sys.stderr.write(f"migrate {service}: {explained(error)}{_NEWER if _UNKNOWN_REVISION in str(error) else ''}\n")
        return 1
    sys.stdout.write(f"migrate {service}: up to date\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
