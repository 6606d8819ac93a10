"""The variables that a service, a migration and a client need to find the stack."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values

from tessera.local.folders import CHECKOUT
from tessera.local.ports import LOOPBACK
from tessera.local.tools import KAFKA_NAMES

SERVICES = ("gateway", "tokenizer", "memory", "generator", "retention", "validator")
RUNTIME_ROLES = ("worker", "client")
ALL_ROLES = (*RUNTIME_ROLES, "owner")
DATABASE = "tessera"
GIVEN = {
    "KAFKA_BOOTSTRAP_SERVERS": KAFKA_NAMES,
    "DATABASE_URL": ("DATABASE_URL", "TESSERA_ADMIN_DATABASE_URL"),
    "REDIS_URL": ("REDIS_URL", "TESSERA__REDIS__URL"),
}


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
    """How a service is started. No garbage is collected while modules are imported, which saves a fifth of that; `run_service` begins."""
    return (python, "-c", f"import gc; gc.disable(); from tessera.{service}.app import main; main()")


def given_addresses(ports: Mapping[str, int]) -> dict[str, str]:
    """Addresses from the environment or `.env`, without those that `make env` exported for our own servers."""
    own = [re.compile(rf"{LOOPBACK}:{port}(?!\d)") for port in ports.values()]
    told = {**settings_file(), **os.environ}
    found = {name: next((told[alias] for alias in aliases if told.get(alias)), None) for name, aliases in GIVEN.items()}
    return {name: address for name, address in found.items() if address and not any(pattern.search(address) for pattern in own)}


def hosts(address: str) -> list[str]:
    """Every `host:port` of a given address, without names and passwords."""
    return [one.strip() for one in re.sub(r"^\w+://|[/?].*$", "", address).rpartition("@")[2].split(",")]


def settings_file() -> dict[str, str | None]:
    """`.env` of the checkout."""
    return dotenv_values(CHECKOUT / ".env")
