"""`python -m tessera.bus.make_acls`: access control lists of every service, and of tenants' producers, from the catalogue.

Prints them as lines for kafka-acls.sh; with `--apply` asks the cluster of `TESSERA__KAFKA__…`, as an administrator.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from tessera.bus.access import Grant, command_lines, service_rights, shared_producers_rights, tenant_rights
from tessera.bus.access_admin import access_lists
from tessera.bus.make_topics import TopicSettings
from tessera.bus.settings import KafkaSettings
from tessera.contracts.catalogue import SERVICES
from tessera.contracts.errors import TesseraError


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    tenants: Sequence[str] = ()
    shared_producers: Sequence[str] = ()
    service_principal: str = "User:tessera-{service}"
    tenant_principal: str = "User:tenant-{tenant}"

    def grants(self, kafka: KafkaSettings) -> set[Grant]:
        """Every line. Raises InvalidError `tenant_invalid`. Where several share a principal, one's denial does not take another's right."""
        every = set(self._each(kafka))
        return {grant for grant in every if grant.allowed or replace(grant, allowed=True) not in every}

    def _each(self, kafka: KafkaSettings) -> Iterator[Grant]:
        for service in SERVICES:
            principal = self.service_principal.format(service=service)
            yield from (right.granted(principal, kafka) for right in service_rights(service))
        for tenant in self.tenants:
            principal = self.tenant_principal.format(tenant=tenant)
            yield from (right.granted(principal, kafka) for right in tenant_rights(tenant))
        for principal in self.shared_producers:
            yield from (right.granted(principal, kafka) for right in shared_producers_rights())


async def apply(kafka: KafkaSettings, grants: set[Grant], *, remove_others: bool = False) -> tuple[set[Grant], set[Grant]]:
    """Makes the cluster allow `grants`; returns (added, others): lines of the same principals under our prefix that are not among them.

    The others are removed where asked. Raises FatalError when the cluster refuses, RetryableError when it does not answer.
    """
    async with access_lists(kafka) as lists:
        known: set[Grant] = set()
        for principal in sorted({grant.principal for grant in grants}):
            known |= await lists.of(principal)
        added, others = grants - known, {grant for grant in known - grants if grant.name.startswith(kafka.topic_prefix)}
        await lists.add(sorted(added))
        if remove_others:
            await lists.remove(sorted(others))
    return added, others


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 1 when the cluster refused or did not answer, 2 for wrong settings or arguments."""
    options = _parser().parse_args(arguments)
    request = Request(options.tenant, options.shared_producers, options.service_principal, options.tenant_principal)
    try:
        kafka = TopicSettings().kafka
        grants = request.grants(kafka)
        if options.apply:
            sys.stdout.write(_told(*asyncio.run(apply(kafka, grants, remove_others=options.remove_others)), removed=options.remove_others))
        else:
            sys.stdout.writelines(f"{line}\n" for line in command_lines(grants, kafka.bootstrap_servers))
    except (ValidationError, KeyError) as error:
        return _complain(2, f"settings: {error}")
    except TesseraError as error:
        return _complain(1, error.message)
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = Request()
    parser = argparse.ArgumentParser(prog="python -m tessera.bus.make_acls", description="Access control lists from the catalogue.")
    parser.add_argument("--apply", action="store_true", help="ask the cluster instead of printing lines for kafka-acls.sh")
    parser.add_argument("--tenant", action="append", default=[], help="a tenant whose producers get their topics; may be repeated")
    parser.add_argument(
        "--shared-producers", action="append", default=[], metavar="PRINCIPAL", help="may write the shared topic; may be repeated"
    )
    parser.add_argument("--service-principal", default=defaults.service_principal, help="default: %(default)s")
    parser.add_argument("--tenant-principal", default=defaults.tenant_principal, help="default: %(default)s")
    parser.add_argument("--remove-others", action="store_true", help="with --apply: take away what the catalogue does not give")
    return parser


def _told(added: set[Grant], others: set[Grant], *, removed: bool) -> str:
    lines = [f"access control lists ready: {len(added)} lines added\n"]
    fate = "removed" if removed else "left (--remove-others takes them away)"
    lines += [
        f"not from the catalogue, {fate}: {other.principal} {other.operation} {other.resource} {other.name}\n" for other in sorted(others)
    ]
    return "".join(lines)


def _complain(code: int, message: object) -> int:
    sys.stderr.write(f"tessera.bus.make_acls: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
