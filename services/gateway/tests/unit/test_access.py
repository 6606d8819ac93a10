"""The cache of keys."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tessera.contracts.errors import RetryableError
from tessera.gateway.domain import keys
from tessera.gateway.domain.audit import Actor
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.keys import StoredKey
from tessera.gateway.handlers.access import CACHED_KEYS, KeyCache, LastUses, bootstrap

pytestmark = pytest.mark.unit


async def test_a_key_is_looked_up_once_and_an_unknown_one_each_time(desk: Any) -> None:
    authenticator = desk.rooms.authenticator
    for _ in range(3):
        assert (await authenticator.principal(f"bearer {desk.key}")).tenant_id == "default"
    assert desk.store.looked_up == 1
    stranger = keys.generate("test").reveal()
    for _ in range(2):
        with pytest.raises(ApiError):
            await authenticator.principal(f"Bearer {stranger}")
    assert desk.store.looked_up == 3


async def test_another_secret_with_a_known_id_is_refused(desk: Any) -> None:
    known = keys.parse(desk.key)
    assert known is not None
    forged = keys.ApiKey(known.environment, known.id, keys.generate("test").secret)
    with pytest.raises(ApiError, match="Incorrect"):
        await desk.rooms.authenticator.principal(f"Bearer {forged.reveal()}")


async def test_a_rotated_key_opens_at_once_where_the_old_one_is_remembered(desk: Any) -> None:
    """Another replica rotates: this one has the row before in its cache."""
    authenticator, here = desk.rooms.authenticator, keys.parse(desk.key)
    assert here is not None
    await authenticator.principal(f"Bearer {desk.key}")
    renewed = keys.ApiKey(here.environment, here.id, keys.new_secret())
    now = datetime.now(UTC)
    await desk.store.rotate_key(here.id, authenticator.digest(renewed.secret), now, now + timedelta(seconds=60), Actor("unknown"))
    for presented in (renewed, here):
        assert (await authenticator.principal(f"Bearer {presented.reveal()}")).key_id == here.id


async def test_uses_are_written_once_and_again_where_that_failed(desk: Any) -> None:
    uses = LastUses(desk.store, desk.rooms.authenticator)
    await uses.once()
    assert desk.store.used == {}
    principal = await desk.rooms.authenticator.principal(f"Bearer {desk.key}")
    desk.store.away = RetryableError("away")
    with pytest.raises(RetryableError):
        await uses.once()
    desk.store.away = None
    await uses.once()
    assert set(desk.store.used) == {principal.key_id}
    desk.store.used.clear()
    await uses.once()
    assert desk.store.used == {}


def test_entries_grow_old_and_the_oldest_make_room() -> None:
    now = [0.0]
    cache = KeyCache(lambda: now[0])
    first = StoredKey("t", "first", b"", frozenset())
    cache.put(first)
    now[0] = 4.9
    assert cache.get("first") is first
    now[0] = 5.0
    assert cache.get("first") is None
    cache.put(first)
    for number in range(CACHED_KEYS):
        cache.put(StoredKey("t", str(number), b"", frozenset()))
    assert cache.get("first") is None


async def test_the_bootstrap_key_may_be_made_again(desk: Any) -> None:
    key = keys.generate("dev")
    for _ in range(2):
        await bootstrap(desk.store, desk.rooms.authenticator, "home", key)
    principal = await desk.rooms.authenticator.principal(f"Bearer {key.reveal()}")
    assert (principal.tenant_id, principal.scopes) == ("home", frozenset(keys.SCOPES))


STUCK = {"topic": "ingest", "partition": 3, "offset": 1742, "outcome": "retry"}


async def test_an_operator_decides_about_a_stuck_event(desk: Any) -> None:
    async with desk.client() as client:
        answer = await client.post("/v1/services/memory/control", json={"action": "resume", "parked": STUCK})
    assert (answer.status_code, answer.json()["parked"]) == (202, STUCK)
    ((command, _),) = desk.log.published
    assert command.parked.model_dump() == STUCK


async def test_an_operator_controls_a_service(desk: Any) -> None:
    async with desk.client() as client:
        answer = await client.post("/v1/services/memory/control", json={"action": "pause", "consumer": "ingestion"})
    expected = {"service": "memory", "action": "pause", "consumer": "ingestion", "instance": None, "parked": None}
    assert (answer.status_code, answer.json()) == (202, {"status": "accepted", **expected})
    ((command, options),) = desk.log.published
    assert command.model_dump() == expected
    assert options["key"] == b"memory"


@pytest.mark.parametrize(
    ("service", "body", "refusal"),
    [
        ("kitchen", {"action": "pause"}, (404, "service_not_found", None)),
        ("memory", {"action": "pause", "consumer": "lunch"}, (400, "invalid_value", "consumer")),
        ("memory", {"action": "stop"}, (400, "invalid_value", "action")),
        ("memory", {"action": "pause", "parked": STUCK}, (400, "invalid_value", None)),
    ],
)
async def test_a_command_that_nobody_could_obey_is_refused(
    desk: Any, service: str, body: dict[str, Any], refusal: tuple[int, str, str | None]
) -> None:
    async with desk.client() as client:
        answer = await client.post(f"/v1/services/{service}/control", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == refusal
    assert desk.log.published == []
