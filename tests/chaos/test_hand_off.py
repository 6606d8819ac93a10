"""Kafka is away, and what the gateway accepted meanwhile is there exactly once afterwards, whatever dies (docs/hand-off.md)."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos.observing import PATIENCE_SECONDS, counter, records, repeated, rows, settled

from tessera.gateway.domain import spool
from tessera.local.kafka import Kafka
from tessera.testkit import ServiceProcess, Stack, eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

ORIGINS = "SELECT origin_id FROM memory.memory WHERE tenant_id = $1 ORDER BY origin_id"
PADDING = "x" * 15_000
BATCH = 60
"""Padded messages in one request, whose body may have a MiB."""
FULL_AFTER = 1024 * 1024


@pytest.fixture(scope="module")
def spooling(killable: Stack) -> Iterator[Platform]:
    """A gateway with a spool, and memory, on a Kafka that may be killed."""
    settings = {
        "TESSERA_GATEWAY__SPOOL__FOLDER": str(killable.folder / "spool"),
        "TESSERA_GATEWAY__SPOOL__MAXIMUM_BYTES": str(FULL_AFTER),
        "TESSERA_GATEWAY__SPOOL__SEGMENT_BYTES": "65536",
        "TESSERA_GATEWAY__PUBLISH_TIMEOUT_SECONDS": "1",
    }
    running = Platform(killable, services=("gateway", "memory"), settings=settings)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def tenant(spooling: Platform, request: pytest.FixtureRequest) -> str:
    return str(request.node.originalname).removeprefix("test_").replace("_", "-")[:40].strip("-")


@pytest.fixture
def key(spooling: Platform, tenant: str) -> str:
    """A key of the tenant, used once: the gateway knows it, and memory the tenant."""
    _joined(spooling.processes["gateway"])
    key = spooling.tenant(tenant)
    settled(spooling, "SELECT 1 FROM memory.tenant WHERE tenant_id = $1", 1, tenant)
    return key


def _joined(gateway: ServiceProcess) -> None:
    """Waits until it has found Kafka and reads from it. With a spool it is ready before."""

    def look() -> bool:
        status, body = gateway.get_admin("/health/ready")
        return status == 200 and '"degraded"' not in body and '"open"' not in body

    gateway.wait_ready()
    eventually_blocking(look, PATIENCE_SECONDS)


@contextmanager
def _away(spooling: Platform) -> Iterator[Kafka]:
    """Inside, Kafka is dead; it is back afterwards."""
    kafka = spooling.stack.kafka
    if kafka is None:
        pytest.fail("this test needs a Kafka of its own: unset KAFKA_BOOTSTRAP_SERVERS")
    kafka.kill()
    try:
        yield kafka
    finally:
        kafka.start()
        kafka.wait_ready()


def _restart(spooling: Platform, **overrides: str) -> None:
    """The gateway again, with other settings; it serves once Kafka is there."""
    gateway = spooling.processes["gateway"]
    gateway.stop()
    gateway.override(**overrides)
    gateway.start()


def _say(spooling: Platform, key: str, name: str, conversation: str = "c", content: str = "The boat is called Marigold.") -> httpx.Response:
    item = {"type": "message", "id": name, "conversation_id": conversation, "role": "user", "content": content}
    return spooling.request("POST", "/v1/memories", key=key, json=item)


def _fill(spooling: Platform, key: str, name: str) -> tuple[httpx.Response, set[str]]:
    """A batch of large messages: the answer, and which of them will not be lost."""
    said = {"type": "message", "role": "user", "content": "x", "metadata": {"padding": PADDING}}
    items = [{**said, "id": f"{name}-{number}", "conversation_id": f"c-{number}"} for number in range(BATCH)]
    answer = spooling.request("POST", "/v1/memories/batch", key=key, json={"items": items})
    return answer, {result["event_id"] for result in answer.json().get("data", ()) if result["status"] == "spooled"}


def _filled(spooling: Platform, key: str) -> set[str]:
    """Sends batches until one is refused as a whole; everything that was promised."""
    promised: set[str] = set()
    for number in range(4):
        answer, kept = _fill(spooling, key, f"b{number}")
        promised |= kept
        if not answer.is_success:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "dependency_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert spooling.request("GET", "/v1/spool").json()["spool"]["records"] == len(promised), "what was refused is not kept"
            return promised
    raise AssertionError("it never was full")


def _arrived(spooling: Platform, tenant: str, promised: set[str]) -> None:
    """Each once."""

    def look() -> bool:
        found = [origin for (origin,) in rows(spooling, ORIGINS, tenant)]
        assert promised <= set(found), f"{len(promised - set(found))} of {len(promised)} are missing"
        assert len(found) == len(set(found))
        return True

    eventually_blocking(look, PATIENCE_SECONDS)


def _status(spooling: Platform, key: str, name: str) -> Any:
    answer = spooling.request("GET", f"/v1/ingest/{name}", key=key)
    return answer.json()["status"] if answer.is_success else None


def _searchable(spooling: Platform, key: str, *names: str) -> None:
    for name in names:
        eventually_blocking(lambda name=name: _status(spooling, key, name) == "searchable", PATIENCE_SECONDS)  # type: ignore[misc]


def _ids(spooling: Platform, tenant: str) -> list[str]:
    return [name for name, _ in records(spooling, f"ingest.{tenant}", tenant)]


def _drained(spooling: Platform) -> None:
    eventually_blocking(lambda: spooling.request("GET", "/v1/spool").json()["spool"] == EMPTY, PATIENCE_SECONDS)


EMPTY = {"enabled": True, "records": 0, "bytes": 0, "oldest_accepted_at": None, "full": False}


def test_kafka_dies_then_the_gateway_between_the_disk_and_an_answer(spooling: Platform, tenant: str, key: str) -> None:
    gateway, names = spooling.processes["gateway"], [f"m-{number}" for number in range(8)]
    _restart(spooling, TESSERA_GATEWAY__CRASH_POINT=f"spooled_before_answer:{len(names) + 1}")
    _joined(gateway)
    with _away(spooling):
        answers = [_say(spooling, key, name) for name in names]
        assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [(202, "spooled")] * 8
        assert _status(spooling, key, "m-3") == "spooled"
        listed = spooling.request("GET", "/v1/spool", params={"limit": 3}).json()
        assert [entry["event_id"] for entry in listed["data"]] == ["m-0", "m-1", "m-2"]
        assert (listed["spool"]["records"], listed["has_more"]) == (8, True)
        assert spooling.request("GET", "/v1/status").json()["spool"]["records"] == 8
        eventually_blocking(lambda: gateway.get_admin("/health/ready")[1].find('"degraded"') > 0, PATIENCE_SECONDS)
        assert gateway.get_admin("/health/ready")[0] == 200
        with pytest.raises(httpx.TransportError):
            _say(spooling, key, "unanswered")
        eventually_blocking(lambda: gateway.exit_code == -signal.SIGKILL, PATIENCE_SECONDS)
        _restart(spooling, TESSERA_GATEWAY__CRASH_POINT="")
    _joined(gateway)
    _searchable(spooling, key, *names, "unanswered")
    assert rows(spooling, ORIGINS, tenant) == [(name,) for name in (*names, "unanswered")]
    assert list(dict.fromkeys(_ids(spooling, tenant))) == [*names, "unanswered"], "in the order of acceptance"
    _drained(spooling)
    assert _say(spooling, key, "unanswered").json()["status"] == "accepted", "the client repeats"
    eventually_blocking(lambda: repeated(records(spooling, f"ingest.{tenant}", tenant)) >= 1, PATIENCE_SECONDS)
    assert rows(spooling, ORIGINS, tenant) == [(name,) for name in (*names, "unanswered")]


def test_new_events_of_a_key_wait_behind_the_spooled_ones(spooling: Platform, tenant: str, key: str) -> None:
    with _away(spooling):
        for number in range(4):
            assert _say(spooling, key, f"m-{number}").status_code == 202
    answers = [_say(spooling, key, f"n-{number}") for number in range(4)]
    assert {answer.status_code for answer in answers} == {202}
    names = [*(f"m-{number}" for number in range(4)), *(f"n-{number}" for number in range(4))]
    _searchable(spooling, key, *names)
    assert list(dict.fromkeys(_ids(spooling, tenant))) == names
    _drained(spooling)
    assert _say(spooling, key, "last").json()["status"] == "accepted"


def test_killed_between_kafka_and_the_deletion(spooling: Platform, tenant: str, key: str) -> None:
    gateway = spooling.processes["gateway"]
    _restart(spooling, TESSERA_GATEWAY__CRASH_POINT="handed_over_before_delete")
    _joined(gateway)
    before = counter(spooling, "memory", "tessera_bus_duplicate_events")
    with _away(spooling):
        assert [_say(spooling, key, name).json()["status"] for name in ("first", "second")] == ["spooled"] * 2
    eventually_blocking(lambda: gateway.exit_code == -signal.SIGKILL, PATIENCE_SECONDS)
    _restart(spooling, TESSERA_GATEWAY__CRASH_POINT="")
    _joined(gateway)
    _searchable(spooling, key, "first", "second")
    eventually_blocking(lambda: counter(spooling, "memory", "tessera_bus_duplicate_events") > before, PATIENCE_SECONDS)
    assert repeated(records(spooling, f"ingest.{tenant}", tenant)) >= 1
    assert rows(spooling, ORIGINS, tenant) == [("first",), ("second",)]
    _drained(spooling)


def test_another_gateway_adopts_what_a_dead_one_left(spooling: Platform, tenant: str, key: str) -> None:
    dying, second = spooling.processes["gateway"], spooling._process("gateway")
    second.start()
    _joined(second)
    try:
        with _away(spooling):
            assert [_say(spooling, key, name).json()["status"] for name in ("first", "second")] == ["spooled"] * 2
            dying.kill()
        spooling.processes["gateway"] = second
        _searchable(spooling, key, "first", "second")
        assert rows(spooling, ORIGINS, tenant) == [("first",), ("second",)]
        _drained(spooling)
    finally:
        spooling.processes["gateway"] = dying
        second.stop()
        dying.start()
        _joined(dying)


def test_a_full_spool_is_503_and_what_it_took_arrives(spooling: Platform, tenant: str, key: str) -> None:
    gateway = spooling.processes["gateway"]
    with _away(spooling):
        promised = _filled(spooling, key)
        assert counter(spooling, "gateway", "tessera_spool_refused") >= 1
        eventually_blocking(lambda: gateway.get_admin("/health/ready")[0] == 503, PATIENCE_SECONDS)
        assert spooling.request("GET", "/v1/spool").json()["spool"]["full"] is True
        assert _say(spooling, key, "small").json()["status"] == "spooled", "there is room for something small"
        eventually_blocking(lambda: gateway.get_admin("/health/ready")[0] == 200, PATIENCE_SECONDS)
    assert len(promised) >= BATCH
    _arrived(spooling, tenant, promised | {"small"})
    _drained(spooling)


def test_what_waited_too_long_is_refused_and_told(spooling: Platform, tenant: str, key: str) -> None:
    gateway = spooling.processes["gateway"]
    with _away(spooling):
        assert _say(spooling, key, "late").json()["status"] == "spooled"
        gateway.kill()
        _age(spooling, timedelta(days=2))
        gateway.start()
    _joined(gateway)
    eventually_blocking(lambda: _status(spooling, key, "late") == "refused", PATIENCE_SECONDS)
    reason = spooling.request("GET", "/v1/ingest/late", key=key).json()["reason"]
    assert (reason["code"], reason["param"]) == ("expired", "deadline")
    told = eventually_blocking(lambda: records(spooling, f"refused.{tenant}", tenant), PATIENCE_SECONDS)
    assert [data["refused_id"] for _, data in told] == ["late"]
    assert rows(spooling, ORIGINS, tenant) == []
    _drained(spooling)


def _age(spooling: Platform, by: timedelta) -> None:
    """Makes everything in the spool of a dead gateway older."""
    (file,) = Path(spooling.settings["TESSERA_GATEWAY__SPOOL__FOLDER"]).glob("*.spool")
    data = file.read_bytes()
    sync = data[len(spool.MAGIC) : spool.HEADER_BYTES]
    aged = [replace(frame.event, accepted_at=frame.event.accepted_at - by) for frame in spool.recover(data).frames]
    file.write_bytes(spool.header(sync) + b"".join(spool.framed(sync, spool.packed(event)) for event in aged))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"NOT TESTED: a full disk, because no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_503_and_what_it_took_arrives(spooling: Platform, tenant: str, key: str, small_disk: Path) -> None:
    gateway = spooling.processes["gateway"]
    folder = spooling.settings["TESSERA_GATEWAY__SPOOL__FOLDER"]
    _restart(spooling, TESSERA_GATEWAY__SPOOL__FOLDER=str(small_disk / "spool"), TESSERA_GATEWAY__SPOOL__MAXIMUM_BYTES=str(8 * FULL_AFTER))
    _joined(gateway)
    try:
        with _away(spooling):
            promised = _filled(spooling, key)
            assert "the spool cannot write" in (spooling.home / "logs" / "gateway.log").read_text(encoding="utf-8")
        assert promised
        _arrived(spooling, tenant, promised)
        _drained(spooling)
    finally:
        _restart(spooling, TESSERA_GATEWAY__SPOOL__FOLDER=folder, TESSERA_GATEWAY__SPOOL__MAXIMUM_BYTES=str(FULL_AFTER))
        _joined(gateway)
