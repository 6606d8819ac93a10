"""Reading the dead letters: pages of what there is, and single ones with all their bytes. `docs/dead-letters.md` tells how and why.

There is no index. The log is read outside groups, in windows, within limits: a page that reaches them is short, and its cursor goes on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from heapq import merge
from itertools import islice
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from tessera.bus.deadletters import DeadLetter, DeadLetterSummary, as_dead_letter, dead_letter_topics
from tessera.bus.events import Position
from tessera.bus.publisher import as_retryable
from tessera.bus.records import Record
from tessera.bus.settings import KafkaSettings
from tessera.bus.stopping import stop_consumer
from tessera.bus.topics import TopicDirectory
from tessera.contracts.catalogue import catalogued
from tessera.contracts.errors import InvalidError
from tessera.resilience import deadline

Keep = Callable[[Sequence[DeadLetterSummary]], Awaitable[Sequence[DeadLetterSummary]]]
"""Which of these are wanted, in the same order: what only the caller knows."""

_READERS: Final = 2
_STEP_RECORDS: Final = 50
_LARGE_BYTES: Final = 64 * 1024
_FIRST_WINDOW: Final = 128
_WINDOWS: Final = (16, 2_048)
_QUICK_SECONDS: Final = 0.2
_POLL_MILLISECONDS: Final = 1_000
_SKEW: Final = timedelta(minutes=5)
"""How far the clocks of those who refuse and those who publish may differ."""


@dataclass(frozen=True, slots=True)
class ScanLimits:
    """What one page may cost."""

    records: int = 50_000
    """Letters examined, give or take a window."""
    duration: timedelta = timedelta(seconds=5)
    """Time for reading, give or take a window."""
    patience: timedelta = timedelta(seconds=25)
    """Longest wait in all, for a free place and for Kafka included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterFilter:
    """Which letters are wanted; a field of None lets all through."""

    topic: str | None = None
    """Where the event was; the name of the shared topic stands for every tenant's, too."""
    service: str | None = None
    code: str | None = None
    since: datetime | None = None
    """Refused at or after."""
    until: datetime | None = None
    """Refused before."""
    event_id: str | None = None
    tenant_id: str | None = None

    def topics(self) -> list[str]:
        """The dead-letter topics that may hold such letters. Raises InvalidError `invalid_value` for a topic that does not exist."""
        base = self._base()
        known = dead_letter_topics().items()
        return [name for name, (topic, service) in known if base in (None, topic) and self.service in (None, service)]

    def matches(self, letter: DeadLetterSummary) -> bool:
        """Whether the letter, which lies on one of `topics()`, is wanted."""
        return (
            self._matches_topic(letter)
            and self.code in (None, letter.code)
            and (self.since is None or letter.refused_at >= self.since)
            and (self.until is None or letter.refused_at < self.until)
            and self.event_id in (None, letter.attributes.get("id"))
            and self.tenant_id in (None, letter.tenant_id)
        )

    def _matches_topic(self, letter: DeadLetterSummary) -> bool:
        return self.topic in (None, self._base()) or (letter.origin is not None and letter.origin.topic == self.topic)

    def _base(self) -> str | None:
        if self.topic is None:
            return None
        try:
            return catalogued(self.topic).name
        except KeyError:
            raise InvalidError("invalid_value", f"There is no topic {self.topic!r}.", "topic") from None


@dataclass(frozen=True, slots=True)
class LetterPage:
    """Some letters, and where to go on; None at the end."""

    letters: list[DeadLetterSummary]
    next_cursor: str | None


class DeadLetterLog:
    """Every dead letter of the platform, as it stands in the log. For one event loop, which it never holds for long."""

    def __init__(self, kafka: KafkaSettings, client_id: str, directory: TopicDirectory, limits: ScanLimits | None = None) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._directory = directory
        self._limits = limits or ScanLimits()
        self._room = asyncio.Semaphore(_READERS)

    async def page(
        self, wanted: LetterFilter, *, limit: int, keep: Keep, newest_first: bool = True, cursor: str | None = None
    ) -> LetterPage:
        """Up to `limit` letters that are `wanted` and kept. A short page is not the last one while it has a cursor.

        What is refused after the first page is on none of the later ones. Raises InvalidError `invalid_value` for a topic or a cursor that
        does not exist, RetryableError when Kafka does not answer, TimedOutError when it takes too long.
        """
        topics = wanted.topics()
        ranges = None if cursor is None else _ranges_of(cursor, topics, newest_first=newest_first)
        async with deadline(self._limits.patience), self._reading() as reading:
            if ranges is None:
                ranges = await reading.bounds([name for name in topics if await self._directory.exists(name)], wanted.since)
            budget = _Budget(self._limits)
            streams = [_Stream(topic, low, high, newest_first) for topic, (low, high) in ranges.items()]
            for stream in streams:
                await _fill(reading, stream, wanted, limit=limit, keep=keep, budget=budget)
        return _page(streams, limit, newest_first=newest_first)

    async def letters(self, ids: Iterable[str]) -> AsyncGenerator[tuple[str, DeadLetter | None], None]:
        """Each letter named, whole, in the order of the log; None where there is no such letter. One is in memory at a time.

        Raises as `page` does.
        """
        places = {name: _place_of(name) for name in ids}
        known = {name: place for name, place in places.items() if place is not None and await self._directory.exists(place.topic)}
        for name in places.keys() - known.keys():
            yield name, None
        if not known:
            return
        async with self._reading() as reading:
            bounds = await reading.bounds({place.topic for place in known.values()})
            for name, place in sorted(known.items(), key=lambda entry: entry[1]):
                low, high = bounds.get(place.topic, (0, 0))
                yield name, await reading.at(place) if place.partition == 0 and low <= place.offset < high else None

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[_Reading]:
        consumer = AIOKafkaConsumer(
            **self._kafka.connection(self._client_id),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=self._kafka.fetch_max_wait_milliseconds,
        )
        async with self._room:
            try:
                with as_retryable():
                    await consumer.start()
                    yield _Reading(consumer, self._kafka, self._limits.patience)
            finally:
                await stop_consumer(consumer)


class _Reading:
    """One consumer on one dead-letter topic after another; each has one partition."""

    def __init__(self, consumer: AIOKafkaConsumer, kafka: KafkaSettings, patience: timedelta) -> None:
        self._consumer = consumer
        self._kafka = kafka
        self._patience = patience

    async def bounds(self, topics: Iterable[str], since: datetime | None = None) -> dict[str, tuple[int, int]]:
        """First and next offset of each topic that has letters; the first may be that of a moment shortly before `since`."""
        partitions = {self._partition(topic): topic for topic in topics}
        if not partitions:
            return {}
        starts, ends = await asyncio.gather(
            self._consumer.beginning_offsets(list(partitions)), self._consumer.end_offsets(list(partitions))
        )
        later = await self._later(partitions, since) if since else {}
        found = {topic: (max(starts[each], later.get(each, ends[each] if since else 0)), ends[each]) for each, topic in partitions.items()}
        return {topic: bounds for topic, bounds in found.items() if bounds[0] < bounds[1]}

    async def _later(self, partitions: Iterable[TopicPartition], since: datetime) -> dict[TopicPartition, int]:
        milliseconds = max(0, int((since - _SKEW).timestamp() * 1000))
        found = await self._consumer.offsets_for_times(dict.fromkeys(partitions, milliseconds))
        return {partition: place.offset for partition, place in found.items() if place is not None}

    async def between(self, topic: str, start: int, end: int) -> AsyncIterator[DeadLetter]:
        """Every letter from `start` to below `end`."""
        partition = self._partition(topic)
        await self._go_to(partition, start)
        while await self._consumer.position(partition) < end:
            for record in await self._some(partition):
                if record.offset >= end:
                    return
                if len(record.value or b"") > _LARGE_BYTES:
                    await asyncio.sleep(0)
                yield as_dead_letter(record, topic)

    async def at(self, place: Position) -> DeadLetter | None:
        """The letter at a place within the bounds."""
        async with deadline(self._patience):
            async for letter in self.between(place.topic, place.offset, place.offset + 1):
                return letter
        return None

    async def _some(self, partition: TopicPartition) -> list[Record]:
        """A few records; whoever else waits for the loop gets a turn first."""
        await asyncio.sleep(0)
        fetched = await self._consumer.getmany(partition, timeout_ms=_POLL_MILLISECONDS, max_records=_STEP_RECORDS)
        return list(fetched.get(partition, ()))

    async def _go_to(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self._consumer.assignment():
            self._consumer.assign([partition])
        elif await self._consumer.position(partition) == offset:
            return
        self._consumer.seek(partition, offset)

    def _partition(self, topic: str) -> TopicPartition:
        return TopicPartition(self._kafka.physical(topic), 0)


class _Budget:
    """What is left of the limits."""

    def __init__(self, limits: ScanLimits) -> None:
        self._records = limits.records
        self._until = time.monotonic() + limits.duration.total_seconds()

    @property
    def left(self) -> bool:
        return self._records > 0 and time.monotonic() < self._until

    def spend(self, records: int) -> None:
        self._records -= records


@dataclass(slots=True)
class _Stream:
    """One topic's part of a page: the offsets that were not read yet, and what was found in the others."""

    topic: str
    low: int
    high: int
    newest_first: bool
    found: list[DeadLetterSummary] = field(default_factory=list)
    _given: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self._given = (self.low, self.high)

    @property
    def exhausted(self) -> bool:
        return self.low >= self.high

    def window(self, size: int) -> tuple[int, int]:
        """The offsets to read next."""
        return (max(self.low, self.high - size), self.high) if self.newest_first else (self.low, min(self.high, self.low + size))

    def add(self, kept: Sequence[DeadLetterSummary], window: tuple[int, int]) -> None:
        """Takes what was found in a window."""
        self.found += reversed(kept) if self.newest_first else kept
        self.low, self.high = (self.low, window[0]) if self.newest_first else (window[1], self.high)

    def remaining(self, taken: int) -> tuple[int, int]:
        """The offsets that are left when the first `taken` of what was found are on the page."""
        if taken == len(self.found):
            return self.low, self.high
        low, high = self._given
        if taken == 0:
            return low, high
        last = self.found[taken - 1].place.offset
        return (low, last) if self.newest_first else (last + 1, high)


async def _fill(reading: _Reading, stream: _Stream, wanted: LetterFilter, *, limit: int, keep: Keep, budget: _Budget) -> None:
    """Reads until one more than `limit` was found, the topic ends, or the budget is spent."""
    size = _FIRST_WINDOW
    while len(stream.found) <= limit and not stream.exhausted and budget.left:
        window, began = stream.window(size), time.monotonic()
        letters = [letter.summary async for letter in reading.between(stream.topic, *window)]
        matching = [letter for letter in letters if wanted.matches(letter)]
        stream.add(await keep(matching) if matching else (), window)
        budget.spend(window[1] - window[0])
        quick = time.monotonic() - began < _QUICK_SECONDS
        size = min(max(size * 2 if quick else size // 2, _WINDOWS[0]), _WINDOWS[1])


def _page(streams: Sequence[_Stream], limit: int, *, newest_first: bool) -> LetterPage:
    merged = merge(*(stream.found for stream in streams), key=lambda letter: letter.refused_at, reverse=newest_first)
    letters = list(islice(merged, limit))
    taken = Counter(letter.place.topic for letter in letters)
    left = {stream.topic: stream.remaining(taken[stream.topic]) for stream in streams}
    left = {topic: (low, high) for topic, (low, high) in left.items() if low < high}
    return LetterPage(letters, _cursor_of(left, newest_first=newest_first) if left else None)


def _cursor_of(ranges: Mapping[str, tuple[int, int]], *, newest_first: bool) -> str:
    text = json.dumps({"newest_first": newest_first, "left": ranges}, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _ranges_of(cursor: str, topics: Sequence[str], *, newest_first: bool) -> dict[str, tuple[int, int]]:
    """What a cursor says is left. Raises InvalidError `invalid_value` for one that this question never gave."""
    try:
        given = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        ranges = {str(topic): _range(bounds) for topic, bounds in given["left"].items()}
        if given["newest_first"] is newest_first and ranges.keys() <= set(topics):
            return ranges
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        pass
    raise InvalidError("invalid_value", "This is no cursor of this question; ask without one.", "after")


def _range(bounds: Any) -> tuple[int, int]:
    low, high = bounds
    if not all(type(bound) is int and 0 <= bound < 2**63 for bound in (low, high)):
        raise ValueError("not a range of offsets")
    return low, high


def _place_of(name: str) -> Position | None:
    """The place that a letter's id names; None where it names none."""
    topic, _, rest = name.partition(":")
    partition, _, offset = rest.partition(":")
    if topic not in dead_letter_topics() or not all(part.isascii() and part.isdigit() and len(part) <= 18 for part in (partition, offset)):
        return None
    return Position(topic, int(partition), int(offset))
