"""When a consumer counts as stuck, and when the process does: seconds are milliseconds here, and Kafka is what the test says it is."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
from aiokafka import TopicPartition

from tessera.bus import watch
from tessera.bus.broker import PatientConsumer
from tessera.contracts.errors import RetryableError
from tessera.testkit import eventually

pytestmark = pytest.mark.unit

PARTITION = TopicPartition("ingest", 0)


@dataclass
class Observed:
    """A consumer as the watch sees it, its Kafka, and how often it was told to join anew."""

    kafka_is_away: bool = False
    polls: bool = True
    position: int = 5
    end: int = 5
    held_back: bool = False
    moves: bool = False
    busy: bool = False
    heals: bool = True
    rejoins: int = 0
    looks: int = 0
    guard: watch.Watch = field(init=False)

    def __post_init__(self) -> None:
        self._turned_at = time.monotonic()
        self.guard = watch.Watch(
            "memory.ingestion",
            consumer=lambda: cast(PatientConsumer, self),
            kafka_answers=self._answers,
            rejoin=self._rejoin,
            patience=timedelta(milliseconds=50),
            busy=self._is_busy,
        )

    @property
    def turned_at(self) -> float:
        if self.polls:
            self._turned_at = time.monotonic()
        return self._turned_at

    def _is_busy(self) -> bool:
        self.looks += 1
        return self.busy

    async def _answers(self) -> None:
        if self.kafka_is_away:
            raise RetryableError("away")

    async def _rejoin(self) -> None:
        self.rejoins += 1
        if self.heals:
            self.polls, self.position = True, self.end

    async def some_looks(self) -> None:
        """Waits for far more time and looks than patience lasts."""
        seen, until = self.looks, time.monotonic() + 0.3
        await eventually(lambda: self.looks > seen + 10 and time.monotonic() > until)


@pytest.fixture
async def observed(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Observed]:
    monkeypatch.setattr(watch, "LOOK_EVERY", timedelta(milliseconds=5))

    async def places(consumer: Any) -> dict[TopicPartition, int]:
        consumer.position += consumer.moves
        return {} if consumer.held_back or consumer.position >= consumer.end else {PARTITION: consumer.position}

    monkeypatch.setattr(watch, "_fetched_to", places)
    made = Observed()
    made.guard.start()
    yield made
    await made.guard.stop()


async def test_a_consumer_that_polls_and_is_not_behind_is_left_alone(observed: Observed) -> None:
    await observed.some_looks()
    assert observed.rejoins == 0
    observed.guard.check_live()


async def test_polls_that_do_not_come_back_lead_to_a_new_membership(observed: Observed) -> None:
    observed.polls = False
    await eventually(lambda: observed.rejoins == 1)
    await observed.some_looks()
    assert observed.rejoins == 1
    observed.guard.check_live()


async def test_standing_still_behind_the_end_of_the_log_leads_to_a_new_membership(observed: Observed) -> None:
    observed.end = 9
    await eventually(lambda: observed.rejoins == 1)


async def test_being_behind_and_moving_is_work_and_not_trouble(observed: Observed) -> None:
    observed.end, observed.moves = 1_000_000, True
    await observed.some_looks()
    assert observed.rejoins == 0


async def test_what_is_held_back_on_purpose_is_not_stuck(observed: Observed) -> None:
    observed.end, observed.held_back = 9, True
    await observed.some_looks()
    assert observed.rejoins == 0


async def test_while_kafka_is_away_nothing_counts(observed: Observed) -> None:
    observed.kafka_is_away, observed.polls = True, False
    await observed.some_looks()
    assert observed.rejoins == 0
    observed.guard.check_live()


async def test_joining_anew_in_vain_three_times_is_for_a_new_process(observed: Observed) -> None:
    observed.polls, observed.heals = False, False
    await eventually(lambda: observed.rejoins >= 3)
    with pytest.raises(RetryableError, match="still does not consume"):
        observed.guard.check_live()
    observed.polls = True
    await observed.some_looks()
    observed.guard.check_live()


async def test_whoever_is_busy_is_not_stuck(observed: Observed) -> None:
    observed.polls, observed.busy = False, True
    await observed.some_looks()
    assert observed.rejoins == 0
    observed.busy = False
    await eventually(lambda: observed.rejoins == 1)


async def test_a_question_that_is_not_answered_is_not_asked_again_and_ends_with_the_watch(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_ANSWER_WITHIN", timedelta(milliseconds=5))
    monkeypatch.setattr(watch, "_END_WITHIN", timedelta(milliseconds=5))
    asked: list[int] = []

    async def silence() -> None:
        asked.append(1)
        await asyncio.Event().wait()

    monkeypatch.setattr(observed.guard, "_kafka_answers", silence)
    await eventually(lambda: asked)
    await observed.some_looks()
    assert (len(asked), observed.rejoins) == (1, 0)
    await observed.guard.stop()
    assert observed.guard._open["Kafka"].cancelled()
