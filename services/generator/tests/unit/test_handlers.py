"""Each event becomes a row, an answer or something learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tessera.bus import Received
from tessera.contracts import EventData, GenerationCancelled, GenerationFailed, GenerationReady, ModelReference, TextTokenized
from tessera.generator import handlers
from tessera.generator.domain.models import ModelCatalogue, OfferedModel, local_models
from tessera.generator.ports import Admission, NewJob, TokenizedText

pytestmark = pytest.mark.unit
NewJobs = Callable[..., NewJob]
LIMIT = timedelta(minutes=1)
UPSTREAM = OfferedModel(
    ModelReference(model_id="up", provider="vllm", capability="chat", encoding="o200k_base", template="openai-chat", exact=False),
    "An upstream.",
    "vllm",
    "up",
)
MODELS = ModelCatalogue([*local_models("o200k_base"), UPSTREAM])


@dataclass
class Intake:
    """A JobIntake that remembers what it was told."""

    admission: Admission = "added"
    added: list[NewJob] = field(default_factory=list)
    cancelled: list[tuple[str, str, str]] = field(default_factory=list)
    failures: list[GenerationFailed] = field(default_factory=list)

    async def add(self, job: NewJob) -> Admission:
        self.added.append(job)
        return self.admission

    async def cancel(self, tenant_id: str, generation_id: str, reason: str) -> None:
        self.cancelled.append((tenant_id, generation_id, reason))

    async def fail(self, ready: GenerationReady, failure: GenerationFailed) -> None:
        self.failures.append(failure)


@dataclass
class Learner:
    learned: list[TokenizedText] = field(default_factory=list)

    async def learn(self, text: TokenizedText) -> bool:
        self.learned.append(text)
        return True


def received(data: EventData, deadline: datetime | None = None) -> Received[Any]:
    return Received(
        data=data,
        id="e1",
        source="/tessera/test",
        type=data.event_type,
        time=datetime.now(UTC),
        tenant_id="acme",
        subject_id="ann",
        request_id="req-1",
        deadline=deadline,
        traceparent=None,
        sequence=None,
        correlation_id="c1",
        key=None,
        topic="t",
        partition=0,
        offset=0,
        digest=b"0" * 16,
    )


async def handle(ready: GenerationReady, intake: Intake, deadline: datetime | None = None) -> Intake:
    await handlers.generation_ready(received(ready, deadline), intake, MODELS, LIMIT)
    return intake


async def test_a_generation_becomes_a_job_of_todays_provider(new_job: NewJobs) -> None:
    intake = await handle(new_job("an-older-name", model_id="up").ready, Intake())
    assert (intake.added[0].provider, intake.failures) == ("vllm", [])
    assert intake.added[0].origin.reply_partition == 3


async def test_the_requests_deadline_wins_over_the_default(new_job: NewJobs) -> None:
    deadline = datetime.now(UTC) + timedelta(seconds=5)
    assert (await handle(new_job("up").ready, Intake(), deadline)).added[0].deadline == deadline
    assert (await handle(new_job("up").ready, Intake())).added[0].deadline - datetime.now(UTC) <= LIMIT


@pytest.mark.parametrize(
    ("request_fields", "code"),
    [
        ({"model_id": "gone"}, "model_not_found"),
        ({"model_id": "local/ngram"}, "model_capability_mismatch"),
        ({"model_id": "local/quote", "prompt": "x"}, "model_capability_mismatch"),
        ({"model_id": "local/quote", "parameters": {"n": 2}}, "unsupported_parameter"),
    ],
)
async def test_what_cannot_run_is_answered_at_once(new_job: NewJobs, request_fields: dict[str, Any], code: str) -> None:
    intake = await handle(new_job("x", **request_fields).ready, Intake())
    assert intake.added == []
    assert [failure.problem.code for failure in intake.failures] == [code]


async def test_a_request_that_was_cancelled_before_it_came(new_job: NewJobs) -> None:
    intake = await handle(new_job("up").ready, Intake("cancelled_before"))
    assert [failure.problem.code for failure in intake.failures] == ["generation_cancelled"]


async def test_a_repeated_request_is_left_alone(new_job: NewJobs) -> None:
    assert (await handle(new_job("up").ready, Intake("known"))).failures == []


async def test_a_cancellation_is_the_tenants_own() -> None:
    intake = Intake()
    await handlers.generation_cancelled(received(GenerationCancelled(generation_id="g", reason="client_request")), intake)
    assert intake.cancelled == [("acme", "g", "client_request")]


def tokenized(**changes: Any) -> TextTokenized:
    return TextTokenized(**{"memory_id": "m", "encoding": "o200k_base", "tokens": (1, 2), "composition_id": "ab" * 32, **changes})


async def test_a_text_is_learned_for_its_tenant_and_subject() -> None:
    learner = Learner()
    await handlers.text_tokenized(received(tokenized()), learner, "o200k_base")
    assert learner.learned == [TokenizedText("acme", "ann", "m", "o200k_base", (1, 2), "ab" * 32)]


@pytest.mark.parametrize("changes", [{"encoding": "cl100k_base"}, {"tokens": ()}])
async def test_other_encodings_and_empty_texts_are_not_learned(changes: dict[str, Any]) -> None:
    learner = Learner()
    await handlers.text_tokenized(received(tokenized(**changes)), learner, "o200k_base")
    assert learner.learned == []
