"""The local engines on tables in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from tessera.contracts import ChatMessage, InvalidError
from tessera.encodings import encoding
from tessera.generator.adapters.local_engines import MAXIMUM_TOKENS, NgramEngine, QuoteEngine
from tessera.generator.adapters.tokens import EncodingCounter
from tessera.generator.domain.endings import EngineError
from tessera.generator.domain.kneser_ney import CountTable, Discounts, Distribution, Followers, Ngram, discounts, unigram_distribution
from tessera.generator.domain.pieces import Piece
from tessera.generator.domain.prompts import question_of, text_of, wire_messages, wire_prompt
from tessera.generator.ports import Job

pytestmark = pytest.mark.unit
LeaseJob = Callable[..., Job]
ENCODING = "o200k_base"


@dataclass
class Table:
    """An NgramReader and its NgramModel over a CountTable."""

    table: CountTable = field(default_factory=CountTable)

    @asynccontextmanager
    async def snapshot(self, tenant_id: str, encoding: str) -> AsyncIterator[Table]:
        yield self

    @property
    def unigrams(self) -> Distribution:
        followers = self.table.followers(())
        if not len(followers):
            return Distribution(followers.tokens, followers.counts.astype(float), 1.0)
        return unigram_distribution(followers, self.table.occupancies[1])

    def discounts(self, order: int) -> Discounts:
        return discounts(self.table.occupancies[order])

    async def followers(self, contexts: Sequence[Ngram]) -> Mapping[Ngram, Followers]:
        return {context: found for context in contexts if len(found := self.table.followers(context))}


def learned(*texts: str) -> Table:
    table = Table()
    for text in texts:
        table.table.learn(encoding(ENCODING).encode(text))
    return table


async def said(engine: NgramEngine | QuoteEngine, job: Job) -> list[Piece]:
    return [piece async for piece in engine.generate(job)]


async def completion(table: Table, job: Job) -> tuple[str, str | None]:
    pieces = await said(NgramEngine(table, ENCODING), job)
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


async def test_the_most_probable_continuation(leased_job: LeaseJob) -> None:
    table = learned("Red tiles shine.", "Red tiles shine.", "Red bricks crumble.")
    assert await completion(table, leased_job("n", prompt="Red", parameters={"temperature": 0})) == (" tiles shine.", "stop")


async def test_characters_of_several_tokens_come_whole(leased_job: LeaseJob) -> None:
    table = learned("x \U0001fae0\U0001f9ff y")
    pieces = await said(NgramEngine(table, ENCODING), leased_job("n", prompt="x", parameters={"temperature": 0}))
    assert "".join(piece.text for piece in pieces) == " \U0001fae0\U0001f9ff y"
    assert all("\ufffd" not in piece.text for piece in pieces)


async def test_a_character_cut_by_max_tokens_is_marked(leased_job: LeaseJob) -> None:
    tokens = encoding(ENCODING).encode("\U0001fae0")
    assert len(tokens) > 1
    job = leased_job("n", prompt="", parameters={"temperature": 0, "max_tokens": 1})
    assert await completion(learned("\U0001fae0"), job) == ("\ufffd", "length")


async def test_a_seed_repeats_and_another_does_not(leased_job: LeaseJob) -> None:
    table = learned(*(f"The {color} {thing} lies here." for color in ("red", "green", "blue") for thing in ("tile", "key", "cat")))

    async def texts(**parameters: Any) -> set[tuple[str, str | None]]:
        return {
            await completion(table, leased_job("n", prompt="The", parameters={"temperature": 2, "max_tokens": 20, **parameters}))
            for _ in range(6)
        }

    assert len(await texts(seed=1)) == 1
    assert len(await texts()) > 1


async def test_without_a_seed_the_generation_repeats_itself(leased_job: LeaseJob) -> None:
    table = learned("a b c d", "a c b d", "b a d c")
    job = leased_job("n", prompt="a", parameters={"temperature": 2})
    assert await completion(table, job) == await completion(table, job)


async def test_the_engines_own_limit(leased_job: LeaseJob) -> None:
    table = learned(" la" * 10)
    text, reason = await completion(table, leased_job("n", prompt=" la", parameters={"max_tokens": 100_000, "seed": 1}))
    assert len(encoding(ENCODING).encode(text)) <= MAXIMUM_TOKENS
    assert reason in ("stop", "length")


async def test_nothing_learned(leased_job: LeaseJob) -> None:
    with pytest.raises(EngineError) as caught:
        await completion(Table(), leased_job("n", prompt="x"))
    assert (caught.value.code, caught.value.problem.status) == ("model_has_learned_nothing", 422)


async def test_a_prompt_that_is_no_text(leased_job: LeaseJob) -> None:
    job = leased_job("n", prompt="x")
    request = job.ready.request.model_copy(update={"prompt": "\ud800"})
    broken = Job(job.tenant_id, "g", job.ready.model_copy(update={"request": request}), job.origin, job.deadline, 1, job.progress)
    with pytest.raises(InvalidError, match="cannot be tokenized"):
        await completion(learned("x"), broken)


def test_local_engines_are_always_there() -> None:
    engine = QuoteEngine()
    assert (engine.deterministic, engine.suspended) == (True, timedelta(0))


async def test_a_quote_is_cut_at_max_tokens(leased_job: LeaseJob) -> None:
    question = (ChatMessage(role="user", content="the key?"),)
    job = leased_job("q", messages=question, memories=[("m1", "The key is here.")], parameters={"max_tokens": 3})
    pieces = await said(QuoteEngine(), job)
    assert pieces[-1].finish_reason == "length"
    assert len(encoding(ENCODING).encode("".join(piece.text for piece in pieces))) <= 3


async def test_counting_short_long_and_broken_texts() -> None:
    counter = EncodingCounter()
    assert await counter.count(ENCODING, "") == 0
    assert await counter.count(ENCODING, "a " * 10_000) == len(encoding(ENCODING).encode("a " * 10_000))
    assert await counter.count(ENCODING, "\ud800") >= 1


def test_the_question_is_the_last_thing_the_user_said() -> None:
    parts = ({"type": "text", "text": "Look:"}, {"type": "image_url"}, {"type": "text", "text": "what?"})
    messages = (
        ChatMessage(role="user", content="First?"),
        ChatMessage(role="user", content=parts),
        ChatMessage(role="assistant", content=None),
    )
    assert question_of(messages) == "Look:\nwhat?"
    assert question_of(()) == text_of(messages[2]) == ""


def test_memories_stand_after_the_system_messages(leased_job: LeaseJob) -> None:
    memories = leased_job("x", memories=[("m1", "T")]).ready.memories
    system, user = ChatMessage(role="developer", content="S"), ChatMessage(role="user", content="U")
    assert [message["role"] for message in wire_messages((system, user), memories)] == ["developer", "system", "user"]
    assert [message["role"] for message in wire_messages((system,), memories)] == ["developer", "system"]
    assert wire_prompt("P", memories).endswith("[memory:m1] T\n\nP")
    assert wire_prompt("P", ()) == "P"
