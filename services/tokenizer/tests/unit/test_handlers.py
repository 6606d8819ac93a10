"""The handlers with a vocabulary in memory and an emitter that writes down what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest

from tessera.bus.events import Received
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import topic_of
from tessera.contracts.errors import InvalidError, Problem, RetryableError
from tessera.contracts.events import (
    GenerationEnded,
    GenerationFailed,
    GenerationReady,
    GenerationRequested,
    GenerationTokenized,
    MemoryRecorded,
    TextTokenized,
    TokenizationCompleted,
    TokenizationRequested,
)
from tessera.encodings import encoding
from tessera.resilience import CircuitOpenError
from tessera.tokenizer.domain.composition import Composed, rebuild, token_id
from tessera.tokenizer.handlers import INLINE_CHARACTERS, Handlers
from tessera.tokenizer.ports import Provenance

pytestmark = pytest.mark.unit

D = TypeVar("D", bound=EventData)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TEXT = "Das 世界 👋 hello."


@dataclass
class FakeVocabulary:
    """Keeps compositions in dictionaries; `failure`, where set, is raised instead."""

    stored: dict[tuple[str, bytes], Composed] = field(default_factory=dict)
    provenances: list[Provenance] = field(default_factory=list)
    failure: Exception | None = None

    async def store(self, tenant_id: str, composed: Composed, provenance: Provenance) -> None:
        if self.failure:
            raise self.failure
        self.stored[tenant_id, composed.root] = composed
        self.provenances.append(provenance)

    async def text(self, tenant_id: str, composition_id: bytes) -> bytes:
        if self.failure:
            raise self.failure
        if (tenant_id, composition_id) not in self.stored:
            raise InvalidError("composition_not_found", "none", "composition_id")
        tokens = {token_id(token): token for _, token in encoding("o200k_base").ordinary_tokens()}
        compositions = self.stored[tenant_id, composition_id].compositions
        children = {key: each.children for key, each in compositions.items()}
        return rebuild(composition_id, children, {key: tokens[key] for each in children.values() for key in each if key in tokens})


@dataclass
class FakeEmitter:
    """Writes down what is emitted."""

    published: list[tuple[EventData, str, bytes | None]] = field(default_factory=list)
    replies: list[EventData] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    async def publish(self, data: EventData, *, step: str, index: int = 0, key: bytes | None = None) -> str:
        self.published.append((data, step, key))
        return f"{step}-{index}"

    async def reply(self, data: EventData, *, step: str = "reply", index: int = 0) -> str:
        self.replies.append(data)
        return f"{step}-{index}"

    async def fail(self, problem: Problem) -> str:
        self.problems.append(problem)
        return "failure"


@pytest.fixture
def vocabulary() -> FakeVocabulary:
    return FakeVocabulary()


@pytest.fixture
def emit() -> FakeEmitter:
    return FakeEmitter()


@pytest.fixture
def handlers(vocabulary: FakeVocabulary) -> Handlers:
    return Handlers(vocabulary, "o200k_base")


def received(data: D, **attributes: Any) -> Received[D]:
    return Received(
        data=data,
        **{
            "id": "e1",
            "source": "test",
            "type": data.event_type,
            "time": NOW,
            "tenant_id": "acme",
            "subject_id": None,
            "request_id": "r1",
            "deadline": NOW + timedelta(seconds=10),
            "traceparent": None,
            "sequence": None,
            "correlation_id": None,
            "key": None,
            "topic": topic_of(type(data)).name,
            "partition": 0,
            "offset": 0,
            "digest": b"",
            **attributes,
        },
    )


def generation(**fields: Any) -> GenerationRequested:
    model = {
        "model_id": "m",
        "provider": "p",
        "capability": "chat",
        "encoding": "o200k_base",
        "template": "openai-chat",
        "exact": True,
        "context_tokens": 100_000,
        **fields.pop("model", {}),
    }
    content = {"messages": [{"role": "user", "content": "hello world"}], **fields}
    return GenerationRequested.model_validate({"reply_partition": 3, "generation_id": "g1", "model": model, **content})


def tokenization(**fields: Any) -> TokenizationRequested:
    return TokenizationRequested.model_validate({"reply_partition": 3, "encoding": "o200k_base", **fields})


def memory(text: str | None) -> MemoryRecorded:
    return MemoryRecorded(memory_id="m1", kind="message", origin_id="o1", occurred_at=NOW, recorded_at=NOW, importance=0.5, text=text)


async def test_a_prompt_goes_straight_to_the_generator(handlers: Handlers, emit: FakeEmitter) -> None:
    await handlers.count_prompt(received(generation()), emit)
    [(data, step, key)] = emit.published
    assert isinstance(data, GenerationReady)
    assert (data.prompt.count, data.recall, step, key) == (9, "not_asked", "tokenized", b"g1")


async def test_a_prompt_for_a_completion_is_counted_too(handlers: Handlers, emit: FakeEmitter) -> None:
    await handlers.count_prompt(received(generation(messages=None, prompt="hello world", model={"template": "text"})), emit)
    [(data, _, _)] = emit.published
    assert isinstance(data, GenerationReady)
    assert data.prompt.count == 2


async def test_a_prompt_to_be_grounded_goes_to_memory(handlers: Handlers, emit: FakeEmitter) -> None:
    await handlers.count_prompt(received(generation(memory={})), emit)
    [(data, _, _)] = emit.published
    assert isinstance(data, GenerationTokenized)
    assert data.prompt.source == "counted"


async def test_counting_needs_no_vocabulary(handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter) -> None:
    vocabulary.failure = RetryableError("down")
    await handlers.count_prompt(received(generation()), emit)
    assert len(emit.published) == 1


async def test_a_long_prompt_is_counted_too(handlers: Handlers, emit: FakeEmitter) -> None:
    await handlers.count_prompt(received(generation(messages=[{"role": "user", "content": "hello " * INLINE_CHARACTERS}])), emit)
    [(data, _, _)] = emit.published
    assert isinstance(data, GenerationReady)
    assert data.prompt.count > INLINE_CHARACTERS


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": {"context_tokens": 8}}, "context_length_exceeded", "messages"),
        ({"model": {"encoding": "gpt2"}}, "unknown_encoding", "encoding"),
        ({"model": {"template": "text"}}, "messages_not_supported", "messages"),
    ],
)
async def test_a_prompt_that_cannot_be_used_ends_the_generation(
    handlers: Handlers, emit: FakeEmitter, fields: dict[str, Any], code: str, param: str
) -> None:
    await handlers.count_prompt(received(generation(**fields)), emit)
    ((told, step, key),) = emit.published
    assert isinstance(told, GenerationEnded)
    assert (told.outcome, told.problem and told.problem.code, told.ended_at, step, key) == ("failed", code, NOW, "accounted", b"g1")
    [reply] = emit.replies
    assert isinstance(reply, GenerationFailed)
    assert (reply.generation_id, reply.problem.code, reply.problem.param, reply.problem.status) == ("g1", code, param, 400)


async def test_encode_stores_and_answers(handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter) -> None:
    await handlers.tokenize(received(tokenization(text=TEXT), subject_id="s1"), emit)
    [reply] = emit.replies
    assert isinstance(reply, TokenizationCompleted)
    assert (reply.operation, reply.text, list(reply.tokens)) == ("encode", TEXT, encoding("o200k_base").encode(TEXT))
    assert ("acme", bytes.fromhex(reply.composition_id or "")) in vocabulary.stored
    assert vocabulary.provenances == [Provenance("request", "s1", "s1")]


async def test_decode_by_composition_gives_what_encode_took(handlers: Handlers, emit: FakeEmitter) -> None:
    await handlers.tokenize(received(tokenization(text=TEXT)), emit)
    encoded = emit.replies[0]
    assert isinstance(encoded, TokenizationCompleted)
    await handlers.tokenize(received(tokenization(composition_id=encoded.composition_id)), emit)
    assert emit.replies[1] == encoded.model_copy(update={"operation": "decode"})


async def test_decode_by_tokens_needs_no_vocabulary(handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter) -> None:
    vocabulary.failure = RetryableError("down")
    await handlers.tokenize(received(tokenization(tokens=encoding("o200k_base").encode(TEXT))), emit)
    [reply] = emit.replies
    assert isinstance(reply, TokenizationCompleted)
    assert (reply.operation, reply.text, reply.composition_id) == ("decode", TEXT, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "x", "encoding": "gpt2"}, ("unknown_encoding", "encoding", 400)),
        ({"tokens": [2_000_000_000]}, ("unknown_token", "tokens", 400)),
        ({"tokens": encoding("o200k_base").encode("🪿")[:1]}, ("incomplete_text", "tokens", 400)),
        ({"tokens": encoding("o200k_base").encode("a\x00b")}, ("unsupported_character", "tokens", 400)),
        ({"composition_id": "0" * 64}, ("composition_not_found", "composition_id", 404)),
    ],
)
async def test_what_cannot_be_tokenized_is_told(
    handlers: Handlers, emit: FakeEmitter, fields: dict[str, Any], expected: tuple[str, str, int]
) -> None:
    await handlers.tokenize(received(tokenization(**fields)), emit)
    [problem] = emit.problems
    assert (problem.code, problem.param, problem.status) == expected
    assert emit.replies == []


async def test_half_a_character_has_a_composition_but_is_no_text(handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter) -> None:
    half = b"\xf0\x9f"
    vocabulary.text = lambda *_: _value(half)  # type: ignore[method-assign]
    await handlers.tokenize(received(tokenization(composition_id=token_id(half).hex())), emit)
    assert emit.problems[0].code == "incomplete_text"


async def _value(content: bytes) -> bytes:
    return content


@pytest.mark.parametrize("failure", [RetryableError("down"), CircuitOpenError("postgres", timedelta(seconds=1))])
@pytest.mark.parametrize("fields", [{"text": "x"}, {"composition_id": "0" * 64}])
async def test_a_lost_vocabulary_is_told_at_once(
    handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter, failure: Exception, fields: dict[str, Any]
) -> None:
    vocabulary.failure = failure
    await handlers.tokenize(received(tokenization(**fields)), emit)
    assert [(problem.code, problem.status) for problem in emit.problems] == [("dependency_unavailable", 503)]


async def test_a_recorded_memory_is_learned(handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter) -> None:
    await handlers.learn(received(memory(TEXT), subject_id="s1"), emit)
    [(data, step, key)] = emit.published
    assert isinstance(data, TextTokenized)
    assert (data.memory_id, list(data.tokens), step) == ("m1", encoding("o200k_base").encode(TEXT), "tokenized")
    assert ("acme", bytes.fromhex(data.composition_id)) in vocabulary.stored
    assert vocabulary.provenances == [Provenance("memory", "m1", "s1")]
    assert key is not None


async def test_a_memory_without_text_is_passed_over(handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter) -> None:
    await handlers.learn(received(memory(None)), emit)
    assert (emit.published, vocabulary.stored) == ([], {})


async def test_a_memory_waits_for_a_lost_vocabulary(handlers: Handlers, vocabulary: FakeVocabulary, emit: FakeEmitter) -> None:
    vocabulary.failure = RetryableError("down")
    with pytest.raises(RetryableError):
        await handlers.learn(received(memory(TEXT)), emit)
    assert emit.published == []
