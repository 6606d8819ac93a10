"""Reading dead letters without a server: what was written comes back as it was, and pages together hold every letter once."""

import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus.deadletters import REPLAY_ATTEMPT, UNREADABLE, DeadLetter, DeadLetterSummary, as_dead_letter, dead_letter
from tessera.bus.events import Position
from tessera.bus.letters import DeadLetterLog, LetterFilter, ScanLimits
from tessera.bus.settings import KafkaSettings
from tessera.contracts.errors import InvalidError

pytestmark = pytest.mark.unit

REASON = InvalidError("tenant_unknown", "There is no tenant 'acme'.", "tenantid")


@dataclass
class FakeRecord:
    value: bytes | None
    headers: Sequence[tuple[str, Any]]
    key: bytes | None = None
    topic: str = "ingest"
    partition: int = 2
    offset: int = 9
    timestamp: int = 0


def kept(record: FakeRecord, topic: str = "ingest", *, attempts: int = 1, offset: int = 0) -> DeadLetter:
    """The letter as it is read after it was written."""
    row = dead_letter(record, topic, "memory", REASON, attempts)
    return as_dead_letter(FakeRecord(row.encoded.value, row.encoded.headers, row.key, partition=0, offset=offset), row.topic)


names = (
    st.sampled_from(["ce_id", "content-type", "tessera_dead_letter_code", "tessera_dead_letter_topic", "tessera_dead_letter_x"]) | st.text()
)
headers = st.lists(st.tuples(names, st.binary()), max_size=8)


@given(st.binary(max_size=50), st.none() | st.binary(max_size=9), headers)
def test_the_original_comes_back_whatever_its_headers_are_called(value: bytes, key: bytes | None, given_headers: Any) -> None:
    letter = kept(FakeRecord(value, given_headers, key))
    assert (letter.value, letter.key, letter.headers) == (value, key, given_headers)
    assert letter.summary.origin == Position("ingest", 2, 9)
    assert (letter.summary.code, letter.summary.message, letter.summary.field) == (REASON.code, REASON.message, REASON.field)


@given(st.binary(max_size=50), headers)
def test_a_replay_adds_one_header_that_counts(value: bytes, given_headers: Any) -> None:
    first = kept(FakeRecord(value, given_headers))
    again = first.again()
    assert (again.value, again.headers[-1]) == (value, (REPLAY_ATTEMPT, b"1"))
    assert again.headers[:-1] == [header for header in given_headers if header[0] != REPLAY_ATTEMPT]
    assert kept(FakeRecord(again.value, again.headers)).again().headers[-1] == (REPLAY_ATTEMPT, b"2")


@given(headers, st.integers(0, 2**63 - 1), st.none() | st.binary())
def test_what_no_service_wrote_is_shown_and_cannot_go_anywhere(given_headers: Any, timestamp: int, value: bytes | None) -> None:
    letter = as_dead_letter(FakeRecord(value, given_headers, timestamp=timestamp), "ingest.memory.dlq")
    assert (letter.summary.code, letter.summary.origin) == (UNREADABLE, None)


@pytest.mark.parametrize(
    ("name", "text"), [("topic", "memory.recorded"), ("topic", "nothing"), ("partition", "-1"), ("offset", "x")], ids=str
)
def test_a_forged_reason_cannot_send_an_event_elsewhere(name: str, text: str) -> None:
    row = dead_letter(FakeRecord(b"{}", ()), "ingest", "memory", REASON, 1)
    forged = [(key, text.encode() if key == f"tessera_dead_letter_{name}" else value) for key, value in row.encoded.headers]
    assert as_dead_letter(FakeRecord(b"{}", forged), "ingest.memory.dlq").summary.origin is None


def test_copies_of_a_letter_are_one_letter_and_others_are_not() -> None:
    record = FakeRecord(b"{}", [("ce_id", b"m1")], b"k")
    first = kept(record).summary
    assert kept(record, attempts=3, offset=7).summary.digest == first.digest
    others = [
        replace(record, value=b"{ }"),
        replace(record, key=None),
        replace(record, offset=10),
        replace(record, headers=[("ce_id", b"m2")]),
    ]
    assert len({kept(other).summary.digest for other in others} | {first.digest}) == 5


def test_a_tenants_own_topic_says_whose_it_is_and_else_the_event_does() -> None:
    record = FakeRecord(b"{}", [("ce_tenantid", b"claimed")])
    assert (kept(record, "ingest.acme").summary.tenant_id, kept(record).summary.tenant_id) == ("acme", "claimed")


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LETTER = kept(FakeRecord(b"{}", [("ce_id", b"m1"), ("ce_tenantid", b"acme")]), "ingest.acme").summary


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (LetterFilter(), True),
        (LetterFilter(topic="ingest"), True),
        (LetterFilter(topic="ingest.acme"), True),
        (LetterFilter(topic="ingest.other"), False),
        (LetterFilter(code="tenant_unknown"), True),
        (LetterFilter(code="data_invalid"), False),
        (LetterFilter(event_id="m1"), True),
        (LetterFilter(event_id="m2"), False),
        (LetterFilter(tenant_id="acme"), True),
        (LetterFilter(tenant_id="other"), False),
        (LetterFilter(since=NOON), True),
        (LetterFilter(since=NOON + timedelta(seconds=1)), False),
        (LetterFilter(until=NOON), False),
        (LetterFilter(until=NOON + timedelta(seconds=1)), True),
    ],
    ids=repr,
)
def test_what_a_filter_lets_through(wanted: LetterFilter, found: bool) -> None:
    assert wanted.matches(replace(LETTER, refused_at=NOON)) is found


def test_a_filter_names_the_topics_to_read() -> None:
    assert LetterFilter(topic="ingest.acme", service="memory").topics() == ["ingest.memory.dlq"]
    assert set(LetterFilter(topic="memory.recorded").topics()) == {"memory.recorded.tokenizer.dlq", "memory.recorded.retention.dlq"}
    assert LetterFilter(topic="ingest", service="generator").topics() == []
    with pytest.raises(InvalidError) as refused:
        LetterFilter(topic="nothing").topics()
    assert (refused.value.code, refused.value.field) == ("invalid_value", "topic")


# --- pages ----------------------------------------------------------------------------------------
TOPICS = ("ingest.memory.dlq", "archive.requested.memory.dlq", "sweep.requested.retention.dlq")


@dataclass
class FakeLog:
    """`_Reading` and `TopicDirectory` over lists; each letter's time is its place in `times`."""

    times: dict[str, list[int]]
    read: list[tuple[int, int]] = field(default_factory=list)

    async def exists(self, topic: str) -> bool:
        return topic in self.times

    async def bounds(self, topics: Sequence[str], since: datetime | None) -> dict[str, tuple[int, int]]:
        return {topic: (0, len(self.times[topic])) for topic in topics if self.times[topic]}

    async def between(self, topic: str, start: int, end: int) -> AsyncIterator[DeadLetter]:
        self.read.append((start, end))
        for offset in range(start, end):
            moment = NOON + timedelta(seconds=self.times[topic][offset])
            summary = replace(LETTER, place=Position(topic, 0, offset), refused_at=moment)
            yield DeadLetter(summary, None, (), b"")


def paged(log: FakeLog, limits: ScanLimits | None = None) -> DeadLetterLog:
    made = DeadLetterLog(KafkaSettings(), "test", log, limits)  # type: ignore[arg-type]

    @asynccontextmanager
    async def reading() -> AsyncIterator[FakeLog]:
        yield log

    made._reading = reading  # type: ignore[method-assign,assignment]
    return made


async def even(letters: Sequence[DeadLetterSummary]) -> Sequence[DeadLetterSummary]:
    return [letter for letter in letters if letter.place.offset % 2 == 0]


async def everything(made: DeadLetterLog, limit: int, *, newest_first: bool) -> list[list[DeadLetterSummary]]:
    pages, cursor = [], None
    for _ in range(1_000):
        page = await made.page(LetterFilter(), limit=limit, keep=even, newest_first=newest_first, cursor=cursor)
        pages.append(page.letters)
        cursor = page.next_cursor
        if cursor is None:
            return pages
    raise AssertionError("there is always another page")


logs = st.dictionaries(st.sampled_from(TOPICS), st.lists(st.integers(0, 50), max_size=300).map(sorted), max_size=3)


@given(logs, st.integers(1, 40), st.booleans(), st.sampled_from([1, 200, 50_000]))
async def test_pages_together_hold_every_letter_once_in_the_order_of_its_topic(
    times: dict[str, list[int]], limit: int, newest_first: bool, records: int
) -> None:
    pages = await everything(paged(FakeLog(times), ScanLimits(records=records)), limit, newest_first=newest_first)
    assert all(len(page) <= limit for page in pages)
    for topic, moments in times.items():
        found = [letter.place.offset for page in pages for letter in page if letter.place.topic == topic]
        assert found == sorted(range(0, len(moments), 2), reverse=newest_first)
    if records == 50_000:
        moments = [letter.refused_at for page in pages for letter in page]
        assert moments == sorted(moments, reverse=newest_first)


async def test_the_newest_are_found_without_reading_all() -> None:
    log = FakeLog({TOPICS[0]: list(range(100_000))})
    page = await paged(log).page(LetterFilter(), limit=50, keep=even)
    assert [letter.place.offset for letter in page.letters] == list(range(99_998, 99_898, -2))
    assert sum(end - start for start, end in log.read) < 1_000


async def test_a_page_that_costs_too_much_is_short_and_goes_on() -> None:
    log = FakeLog({TOPICS[0]: [0] * 5_000})
    page = await paged(log, ScanLimits(records=1_000)).page(LetterFilter(event_id="nobody"), limit=50, keep=even)
    assert page.letters == []
    assert page.next_cursor is not None
    assert sum(end - start for start, end in log.read) < 3_100


async def test_what_is_refused_after_the_first_page_is_on_no_later_one() -> None:
    log = FakeLog({TOPICS[0]: [0] * 10})
    first = await paged(log).page(LetterFilter(), limit=2, keep=even, newest_first=False)
    log.times[TOPICS[0]] += [1] * 10
    second = await paged(log).page(LetterFilter(), limit=50, keep=even, newest_first=False, cursor=first.next_cursor)
    assert [letter.place.offset for letter in second.letters] == [4, 6, 8]
    assert second.next_cursor is None


def cursor_of(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "%",
        "abc",
        cursor_of([]),
        cursor_of({"newest_first": True, "left": [1]}),
        cursor_of({"newest_first": False, "left": {}}),
        cursor_of({"newest_first": True, "left": {"memory.recorded": [0, 1]}}),
        cursor_of({"newest_first": True, "left": {TOPICS[0]: [0]}}),
        cursor_of({"newest_first": True, "left": {TOPICS[0]: [-1, 1]}}),
        cursor_of({"newest_first": True, "left": {TOPICS[0]: [0, True]}}),
        cursor_of({"newest_first": True, "left": {TOPICS[0]: ["0", 1]}}),
    ],
)
async def test_a_cursor_that_nobody_gave_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidError) as refused:
        await paged(FakeLog({})).page(LetterFilter(), limit=1, keep=even, cursor=cursor)
    assert (refused.value.code, refused.value.field) == ("invalid_value", "after")
