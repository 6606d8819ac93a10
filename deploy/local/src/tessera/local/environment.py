"""The variables that a service, a migration and a client need to find the stack."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

SERVICES = ("gateway", "tokenizer", "memory", "generator", "retention", "validator")
RUNTIME_ROLES = ("worker", "client")
ALL_ROLES = (*RUNTIME_ROLES, "owner")
DATABASE = "tessera"


@dataclass(frozen=True)
class Addresses:
    """Where the three servers are."""

    kafka_bootstrap_servers: str
    database_url: str
    """Of an administrator who may create databases and roles; holds a password."""
    redis_url: str
    """May hold a password."""


def common_environment(addresses: Addresses, home: Path, database: str = DATABASE) -> dict[str, str]:
    """What all services share, without passwords of roles."""
    server = urlsplit(addresses.database_url)
    return {
        "TESSERA_HOME": str(home),
        "TESSERA__KAFKA__BOOTSTRAP_SERVERS": addresses.kafka_bootstrap_servers,
        "TESSERA__POSTGRES__HOST": unquote(server.hostname or "127.0.0.1"),
        "TESSERA__POSTGRES__PORT": str(server.port or 5432),
        "TESSERA__POSTGRES__DATABASE": database,
        "TESSERA__REDIS__URL": addresses.redis_url,
    }


def password_environment(service: str, password_of: Callable[[str], str], roles: Iterable[str] = RUNTIME_ROLES) -> dict[str, str]:
    """The passwords of a service's roles; a running service gets no owner's, and only the gateway has an authenticator.

    `password_of` gives the password of `<service>_<role>`.
    """
    named = [*roles, "authenticator"] if service == "gateway" else roles
    return {f"TESSERA_{service.upper()}__POSTGRES__{role.upper()}_PASSWORD": password_of(f"{service}_{role}") for role in named}


def instance_environment(service: str, instance: str, admin_port: int) -> dict[str, str]:
    """Who one process is."""
    prefix = f"TESSERA_{service.upper()}__"
    return {f"{prefix}INSTANCE": instance, f"{prefix}ADMIN_PORT": str(admin_port)}


def service_program(service: str, python: str) -> tuple[str, ...]:
    """How a service is started."""
    return (python, "-c", f"from tessera.{service}.app import main; main()")
