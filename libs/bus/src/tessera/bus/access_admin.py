"""Access control lists on the cluster, asked for in Kafka's protocol: aiokafka's administrator has no call for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest, DescribeAclsRequest

from tessera.bus.access import Grant, Operation, Pattern, Resource
from tessera.bus.publisher import as_retryable
from tessera.bus.settings import KafkaSettings
from tessera.contracts.errors import FatalError

# The codes of the protocol: https://kafka.apache.org/protocol (AclOperation, ResourceType, ResourcePatternType, AclPermissionType).
_ANY: Final = 1
_RESOURCES: Final = {Resource.TOPIC: 2, Resource.GROUP: 3}
_PATTERNS: Final = {Pattern.LITERAL: 3, Pattern.PREFIXED: 4}
_OPERATIONS: Final = {Operation.READ: 3, Operation.WRITE: 4, Operation.CREATE: 5, Operation.DESCRIBE: 8}
_DENY, _ALLOW = 2, 3
_ANY_HOST: Final = "*"
_REASONS: Final = {
    29: "this principal may not describe topics",
    31: "this principal may not alter access",
    54: "the brokers have no authorizer: set authorizer.class.name",
}


class AccessLists:
    """What the cluster allows now, and changes to it. One request per line; repeating one is harmless."""

    def __init__(self, client: AIOKafkaClient) -> None:
        self._client = client

    async def add(self, grants: Iterable[Grant]) -> None:
        """Adds lines. Raises FatalError when the cluster refuses, RetryableError when it does not answer."""
        for grant in grants:
            answer = await self._ask(CreateAclsRequest(*_binding(grant)))
            for code, message in answer.creation_responses:
                _require(code, message)

    async def remove(self, grants: Iterable[Grant]) -> None:
        """Removes lines. Raises as `add` does."""
        for grant in grants:
            answer = await self._ask(DeleteAclsRequest(*_binding(grant)))
            for code, message, _ in answer.filter_responses:
                _require(code, message)

    async def of(self, principal: str) -> set[Grant]:
        """The lines of one principal that are of the kinds made here. Raises as `add` does."""
        answer = await self._ask(DescribeAclsRequest(_ANY, None, _ANY, principal, None, _ANY, _ANY))
        _require(answer.error_code, answer.error_message)
        return {
            grant
            for kind, name, pattern, lines in answer.resources
            for line in lines
            if (grant := _read((kind, name, pattern), line)) is not None
        }

    async def _ask(self, request: Any) -> Any:
        with as_retryable():
            return await self._client.send(self._client.get_random_node(), request)


@asynccontextmanager
async def access_lists(kafka: KafkaSettings) -> AsyncIterator[AccessLists]:
    """Connects as an administrator. Raises RetryableError while no broker answers."""
    client = AIOKafkaClient(**kafka.connection("tessera-access"))
    try:
        with as_retryable():
            await client.bootstrap()
        yield AccessLists(client)
    finally:
        await client.close()


def _binding(grant: Grant) -> tuple[int, str, int, str, str, int, int]:
    permission = _ALLOW if grant.allowed else _DENY
    pattern, operation = _PATTERNS[grant.pattern], _OPERATIONS[grant.operation]
    return _RESOURCES[grant.resource], grant.name, pattern, grant.principal, _ANY_HOST, operation, permission


def _read(named: tuple[int, str, int], line: tuple[str, str, int, int]) -> Grant | None:
    """None for lines of another making: clusters, transactional ids, single hosts."""
    (kind, name, pattern), (principal, host, operation, permission) = named, line
    resource, how, what = _key(_RESOURCES, kind), _key(_PATTERNS, pattern), _key(_OPERATIONS, operation)
    if resource is None or how is None or what is None or host != _ANY_HOST:
        return None
    return Grant(principal, resource, how, name, what, permission == _ALLOW)


def _key(table: dict[Any, int], code: int) -> Any:
    return next((key for key, known in table.items() if known == code), None)


def _require(code: int, message: str | None) -> None:
    if code:
        raise FatalError(f"the cluster refused: {_REASONS.get(code) or message or f'error {code}'}")
