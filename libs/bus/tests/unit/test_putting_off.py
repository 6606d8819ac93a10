"""What waits where: the index of parked events, records of retry topics, the limit on dead letters, and whose failure it is."""

from collections import defaultdict
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus.applying import Attempts
from tessera.bus.calling import HandlerTimeoutError, is_own_storage
from tessera.bus.caution import LetterGuard, LetterLimit
from tessera.bus.deadletters import CONSUMER_CRASHED, HANDLER_FAILED, counts_as_ours
from tessera.bus.events import Position
from tessera.bus.parked import Chain, Parked, ParkedIndex, State, StoredRecord
from tessera.bus.retries import due_in, next_retry, retry_row, waiting
from tessera.bus.transactional import is_timed_out
from tessera.contracts.catalogue import RETRY_TOPICS, TOPICS, Mode, RetryTopic, catalogued, tenant_of_topic
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.resilience import CircuitOpenError
from tessera.storage import Database, ObjectsUnavailableError, PostgresSettings, StorageConflictError, StorageUnavailableError

pytestmark = pytest.mark.unit

PLACE = Position("text.tokenized", 3, 17)
RECORD = StoredRecord("p.text.tokenized", 3, 17, 1_700_000_000_000, b"key", b"\xff bytes", [("ce_id", b"e1"), ("x", b"\xff\x00")])
FIRST = RETRY_TOPICS["text.tokenized.generator.retry.5s"]


# --- retry topics -----------------------------------------------------------------------------------
def test_retry_topics_are_where_order_does_not_matter_and_effects_are_transactional() -> None:
    for topic in TOPICS.values():
        for consumer in topic.consumers:
            wanted = topic.order_free and consumer.mode is Mode.TRANSACTIONAL
            assert bool(topic.retry_topics(consumer.service)) is wanted, topic.name
    names = [retry.name.rsplit(".", 1)[1] for retry in TOPICS["text.tokenized"].retry_topics("generator")]
    assert names == ["5s", "1m", "10m"]


def test_a_retry_topic_belongs_to_its_catalogue_entry_and_to_no_tenant() -> None:
    assert catalogued(FIRST.name) is TOPICS["text.tokenized"]
    assert tenant_of_topic(FIRST.name) is None


def test_the_next_retry_comes_after_the_last_and_there_is_an_end() -> None:
    seen: list[str] = []
    name: str | None = "text.tokenized"
    while name is not None and (retry := next_retry(name, "generator")):
        seen.append(retry.name)
        name = retry.name
    assert seen == [retry.name for retry in TOPICS["text.tokenized"].retry_topics("generator")]
    assert next_retry("memory.recorded", "retention") is None


def test_a_record_comes_out_of_a_retry_topic_as_it_went_in() -> None:
    read = as_read(FIRST)
    found = waiting(read, FIRST)
    assert found.place == PLACE
    original = (RECORD.partition, RECORD.offset, RECORD.timestamp, RECORD.key, RECORD.value, list(RECORD.headers))
    record = found.record
    assert (record.partition, record.offset, record.timestamp, record.key, record.value, list(record.headers)) == original
    assert timedelta(seconds=4) < due_in(read, FIRST) <= timedelta(seconds=5)


def as_read(retry: RetryTopic, more: list[tuple[str, bytes]] | None = None) -> StoredRecord:
    source = StoredRecord(RECORD.topic, 3, 17, RECORD.timestamp, RECORD.key, RECORD.value, [*RECORD.headers, *(more or [])])
    row = retry_row(source, PLACE, retry, RetryableError("busy"))
    return StoredRecord("p." + row.topic, 0, 5, 0, row.key, row.encoded.value, row.encoded.headers)


def test_headers_that_a_producer_called_like_ours_change_nothing() -> None:
    forged = [("tessera_retry_attempt", b"9"), ("tessera_retry_topic", b"ingest"), ("tessera_retry_offset", b"0")]
    found = waiting(as_read(FIRST, forged), FIRST)
    assert found.place == PLACE
    assert list(found.record.headers) == [*RECORD.headers, *forged]


@pytest.mark.parametrize("headers", [[], [("tessera_retry_attempt", b"1")], [("tessera_retry_topic", b"ingest")]])
def test_what_no_consumer_wrote_into_a_retry_topic_is_refused(headers: list[tuple[str, bytes]]) -> None:
    strange = StoredRecord("p." + FIRST.name, 0, 5, 0, None, b"{}", headers)
    with pytest.raises(InvalidError) as refused:
        waiting(strange, FIRST)
    assert refused.value.code == "retry_unreadable"
    assert due_in(strange, FIRST) == timedelta(0)


# --- the index ---------------------------------------------------------------------------------------
class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.sampled_from("abcd-"), st.integers(0, 3), st.sampled_from(["done", "late", "stuck"])), max_size=40), st.data())
def test_only_the_first_of_a_chain_is_ever_due(events: list[tuple[str, int, str]], data: st.DataObject) -> None:
    """Against a naive model: whatever is due is the lowest offset of its chain, and nothing is forgotten."""
    clock = Clock()
    index = ParkedIndex(clock)
    model: dict[str, list[int]] = defaultdict(list)
    fates: dict[int, str] = {}
    for offset, (name, due, fate) in enumerate(events):
        chain = None if name == "-" else Chain("t", name.encode())
        index.add(Parked(offset, chain, State.WAITING, float(due)))
        model[name if chain else f"-{offset}"].append(offset)
        fates[offset] = fate
    stuck: set[int] = set()
    for _ in range(4 * len(events)):
        clock.now += data.draw(st.integers(0, 2))
        entry = index.due()
        heads = {chain[0] for chain in model.values() if chain} - stuck
        assert entry is None or entry.offset in heads
        if entry is None:
            continue
        if fates[entry.offset] == "late":
            fates[entry.offset] = "done"
            index.change(Parked(entry.offset, entry.chain, State.WAITING, clock.now + 2))
        elif fates[entry.offset] == "stuck":
            stuck.add(entry.offset)
            index.change(Parked(entry.offset, entry.chain, State.STUCK, clock.now))
        else:
            index.remove(entry.offset)
            next(chain for chain in model.values() if entry.offset in chain).remove(entry.offset)
    clock.now += 100
    left = {offset for chain in model.values() for offset in chain}
    assert len(index) == len(left)
    assert {entry.offset for entry in index.stuck()} == stuck
    assert (index.due() is None) == (not ({chain[0] for chain in model.values() if chain} - stuck))


def test_a_chain_blocks_until_its_last_event_is_gone() -> None:
    index, chain = ParkedIndex(), Chain("t", b"k")
    for offset in (1, 2):
        index.add(Parked(offset, chain, State.WAITING, 0.0))
    assert index.blocks(chain)
    assert not index.blocks(Chain("other", b"k"))
    assert not index.blocks(None)
    index.remove(1)
    assert index.blocks(chain)
    index.remove(2)
    assert not index.blocks(chain)
    with pytest.raises(ValueError, match="after"):
        index.load([Parked(5, chain, State.WAITING, 0.0), Parked(4, chain, State.WAITING, 0.0)])


# --- dead letters ------------------------------------------------------------------------------------
def test_letters_in_a_row_halt_and_an_applied_event_in_between_does_not() -> None:
    guard = LetterGuard(LetterLimit(3, 1.0))
    for _ in range(5):
        guard.count([True, True])
        guard.passed(1)
    assert guard.reason is None
    guard.count([True, True])
    assert guard.room == 1
    guard.count([True])
    assert guard.reason is not None
    assert guard.room == 0
    guard.forgive()
    assert guard.reason is None
    assert guard.room == 3


def test_a_share_of_letters_halts_however_they_are_spread() -> None:
    guard = LetterGuard(LetterLimit(1_000, 0.1, window=100))
    for number in range(200):
        guard.count([number % 20 == 0])
    assert guard.reason is None
    for number in range(200):
        guard.count([number % 5 == 0])
    assert guard.reason is not None
    assert "of the last" in guard.reason


def test_what_a_producer_outside_did_wrong_is_not_ours() -> None:
    mistake, death = InvalidError("data_invalid", "no"), InvalidError(CONSUMER_CRASHED, "no")
    assert not counts_as_ours("ingest", mistake)
    assert not counts_as_ours("ingest.acme", mistake)
    assert counts_as_ours("ingest.acme", death)
    assert counts_as_ours("memory.recorded", mistake)
    assert not counts_as_ours("memory.recorded", InvalidError("parked_discarded", "an operator's wish"))


def test_after_three_deaths_or_failures_an_event_is_judged() -> None:
    attempts = Attempts({1: 3, 2: 4, 3: 4}, {3})
    attempts.judge(1)
    with pytest.raises(InvalidError) as died:
        attempts.judge(2)
    with pytest.raises(InvalidError) as failed:
        attempts.judge(3)
    assert (died.value.code, failed.value.code) == (CONSUMER_CRASHED, HANDLER_FAILED)


# --- whose failure it is -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "own"),
    [
        (StorageUnavailableError("x"), True),
        (StorageConflictError("x"), True),
        (CircuitOpenError("postgres", timedelta(0)), True),
        (CircuitOpenError("embedder", timedelta(0)), False),
        (ObjectsUnavailableError("x"), False),
        (RetryableError("x"), False),
        (KeyError("x"), False),
    ],
)
def test_only_postgres_errors_and_its_breaker_are_the_own_storage(error: Exception, *, own: bool) -> None:
    settings = PostgresSettings.model_validate({"worker_password": "w", "client_password": "c"})
    assert is_own_storage(error, Database("memory", settings)) is own


def test_a_time_out_is_found_behind_other_errors_and_the_search_ends_where_causes_go_round() -> None:
    cut, broken, other = HandlerTimeoutError("too slow"), RetryableError("the connection was cut"), RetryableError("another")
    broken.__cause__ = cut
    assert is_timed_out(broken)
    other.__context__, broken.__cause__ = broken, other
    assert not is_timed_out(broken)
