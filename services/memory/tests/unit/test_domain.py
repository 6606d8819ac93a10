"""The rules of memory, tried with anything."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.contracts.errors import InvalidError
from tessera.contracts.events import (
    ChatMessage,
    DocumentPublished,
    EntityPublished,
    GenerationRequested,
    MemoryGrounding,
    MessagePublished,
    ModelReference,
    RelationPublished,
    Role,
)
from tessera.contracts.ids import identity_digest
from tessera.contracts.sealing import Sealed
from tessera.memory.domain import admission, bm25, grounding, mentions, views
from tessera.memory.domain.admission import Provenance
from tessera.memory.domain.bm25 import TermStatistics
from tessera.memory.domain.budget import within_budget
from tessera.memory.domain.chunking import chunks
from tessera.memory.domain.fusion import ALONE, IMPORTANCE, RECENCY, RELEVANCE, Bounds, Candidate, Extent, Pair, fused, recency
from tessera.memory.domain.importance import importance
from tessera.memory.domain.records import Turn
from tessera.memory.domain.terms import DIMENSIONS, sparse_text, terms

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 1, tzinfo=UTC)
UNIT = Bounds(0.0, 1.0)
EXTENT = Extent(UNIT, UNIT, UNIT, UNIT)
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=400)
fractions = st.floats(0, 1)
counts = st.dictionaries(st.integers(1, DIMENSIONS), st.integers(1, 50), min_size=1, max_size=30)


def provenance(**changed: Any) -> Provenance:
    given_values = {"tenant_id": "acme", "source": "/s", "id": "event", **changed}
    digest = identity_digest(given_values["tenant_id"], given_values["source"], given_values["id"])
    return Provenance(digest=digest, time=NOW, recorded_at=NOW, **given_values)


class TestImportance:
    @given(st.sampled_from(ROLES), st.none() | st.floats(allow_nan=False))
    def test_lies_between_0_and_1_and_what_is_given_replaces_the_prior(self, role: Role, explicit: float | None) -> None:
        found = importance("message", role, explicit)

        assert 0 <= found <= 1
        assert explicit is None or found == min(1.0, max(0.0, explicit))

    def test_roles_are_ordered(self) -> None:
        assert importance("message", "system") > importance("message", "user") > importance("message", "assistant")


class TestChunks:
    @given(st.text(st.characters(codec="utf-8"), max_size=1_200))
    def test_lose_nothing(self, document: str) -> None:
        found = chunks(document)

        assert "".join(chunk.text for chunk in found) == document
        assert all(document[chunk.start : chunk.end] == chunk.text for chunk in found)

    def test_a_word_at_a_border_is_kept(self) -> None:
        document = "The observatory opened in spring. " * 100

        assert "".join(chunk.text for chunk in chunks(document)) == document


class TestTerms:
    @given(texts)
    def test_are_the_same_whatever_the_case(self, text: str) -> None:
        assert terms(text) == terms(text.casefold())

    def test_words_are_stemmed_and_function_words_left_out(self) -> None:
        assert terms("What did the dogs do?") == terms("dog")

    def test_scripts_without_spaces_give_pairs(self) -> None:
        assert terms("長城") <= terms("万里の長城です")
        assert terms("水") == Counter(terms("水").keys())

    @given(counts)
    def test_sparse_text_counts_dimensions_from_1(self, found: dict[int, int]) -> None:
        text = sparse_text(found)

        assert text.endswith(f"}}/{DIMENSIONS}")
        assert [int(pair.split(":")[0]) for pair in text[1 : text.index("}")].split(",")] == sorted(found)


class TestBm25:
    @given(counts)
    def test_a_repeated_term_adds_less_each_time_and_never_reaches_the_bound(self, found: dict[int, int]) -> None:
        weights = bm25.document_weights(found, "alone")

        assert all(0 < weight < bm25.SATURATION + 1 for weight in weights.values())
        ordered = sorted(found, key=lambda term: found[term])
        assert [weights[term] for term in ordered] == sorted(weights[term] for term in ordered)

    def test_equals_the_published_formula(self) -> None:
        found = {1: 2, 2: 1}
        statistics = TermStatistics(memories=10, holding={1: 3, 3: 1})
        norm = 1.2 * (0.25 + 0.75 * 3 / bm25.PIVOT_LENGTHS["alone"])
        expected = math.log(1 + (10 - 3 + 0.5) / 3.5) * 2 * 2.2 / (2 + norm)

        weights, asked = bm25.document_weights(found, "alone"), bm25.query_weights({1: 1, 3: 1, 4: 1}, statistics)

        assert sum(asked[term] * weights.get(term, 0) for term in asked) == pytest.approx(expected)

    @given(st.integers(0, 10_000), st.integers(0, 10_000))
    def test_rarity_is_never_negative(self, memories: int, holding: int) -> None:
        assert bm25.inverse_frequency(memories, holding) > 0

    def test_only_the_most_frequent_terms_of_an_endless_text_are_kept(self) -> None:
        found = dict.fromkeys(range(1, bm25.MAXIMUM_TERMS + 10), 1) | {999_999: 2}

        weights = bm25.document_weights(found, "alone")

        assert len(weights) == bm25.MAXIMUM_TERMS
        assert 999_999 in weights


pairs = st.builds(Pair, fractions, fractions)
candidates = st.lists(
    st.builds(
        Candidate,
        key=st.integers(),
        vector=st.none() | pairs,
        lexical=st.none() | pairs,
        importance=fractions,
        occurred_at=st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    ),
    max_size=20,
)


class TestFusion:
    @given(candidates, st.booleans(), st.integers(1, 30))
    def test_parts_add_up_best_first_within_bounds(self, given_candidates: list[Candidate[int]], vectors: bool, limit: int) -> None:
        ranked = fused(given_candidates, EXTENT, vectors=vectors, now=NOW, limit=limit)

        totals = [one.scores.total for one in ranked]
        assert len(ranked) == min(limit, len(given_candidates))
        assert totals == sorted(totals, reverse=True)
        assert all(0 <= total <= RELEVANCE + IMPORTANCE + RECENCY + 1e-9 for total in totals)
        for one in ranked:
            parts = one.scores
            assert parts.total == pytest.approx(parts.vector + parts.lexical + parts.importance + parts.recency)
            assert vectors or parts.vector == 0

    @given(candidates)
    def test_ranks_count_from_1_without_gaps(self, given_candidates: list[Candidate[int]]) -> None:
        ranked = fused(given_candidates, EXTENT, vectors=True, now=NOW, limit=100)

        for rank in ("vector_rank", "lexical_rank"):
            places = sorted(place for one in ranked if (place := getattr(one.scores, rank)) is not None)
            assert places == list(range(1, len(places) + 1))

    def test_a_match_beats_every_importance_and_recency(self) -> None:
        matching = Candidate("match", Pair(1, 1), Pair(1, 1), 0.0, NOW - timedelta(days=3_000))
        shiny = Candidate("shiny", Pair(0.8, 0.8), None, 1.0, NOW)

        best = fused([shiny, matching], EXTENT, vectors=True, now=NOW, limit=1)[0]

        assert best.key == "match"

    def test_the_memory_itself_beats_its_neighbour(self) -> None:
        itself = Candidate("itself", Pair(1, 0), None, 0.5, NOW)
        neighbour = Candidate("neighbour", Pair(0, 1), None, 0.5, NOW)

        best = fused([neighbour, itself], EXTENT, vectors=True, now=NOW, limit=1)[0]

        assert best.key == "itself"
        assert best.scores.vector == pytest.approx(RELEVANCE / 2 * ALONE)

    def test_equal_values_everywhere_scale_to_nothing(self) -> None:
        assert Bounds(0.3, 0.3).scaled(0.3) == 0

    def test_recency_halves_and_the_future_is_now(self) -> None:
        assert recency(NOW - timedelta(days=30), NOW) == pytest.approx(0.5)
        assert recency(NOW + timedelta(days=1), NOW) == 1


class TestViews:
    @given(texts, st.lists(texts, max_size=4))
    def test_context_ends_with_the_memory_and_stays_short_enough_to_be_read(self, text: str, before: list[str]) -> None:
        turn = Turn(occurred_at=NOW, text=text, said_by="user")

        found = views.context(turn, [Turn(occurred_at=NOW, text=earlier, said_by="user") for earlier in before])

        assert found.endswith(views.alone(turn))
        assert len(found) <= max(views.CONTEXT_CHARACTERS, len(views.alone(turn)))

    def test_date_speaker_and_title_belong_to_the_text(self) -> None:
        assert views.alone(Turn(occurred_at=NOW, text="Hello.", said_by="Maria")) == "1 January 2026 Maria: Hello."
        assert views.alone(Turn(occurred_at=NOW, text="Hello.", title="Guide")) == "1 January 2026 Guide: Hello."

    def test_the_two_turns_before_come_first(self) -> None:
        before = [Turn(occurred_at=NOW, text=text, said_by="Ada") for text in ("one", "two", "three")]

        assert views.context(Turn(occurred_at=NOW, text="four", said_by="Bob"), before) == "Ada: two\nAda: three\n1 January 2026 Bob: four"


class TestMentions:
    @pytest.mark.parametrize(
        ("text", "named"),
        [("I met ADA BYRON today.", True), ("Ada-Byron?", True), ("Adamant Byron", False), ("Byron, Ada", False), ("", False)],
    )
    def test_whole_words_in_order_whatever_the_case(self, text: str, named: bool) -> None:
        names = mentions.names_of("Ada Byron", ())

        assert mentions.mentions(text, names) is named
        assert bool(names & mentions.phrases(text)) is named

    @given(texts, st.lists(texts, max_size=3))
    def test_both_ways_of_looking_agree(self, text: str, aliases: list[str]) -> None:
        names = mentions.names_of("Ada", tuple(aliases))

        assert mentions.mentions(text, names) is bool(names & mentions.phrases(text))


class TestBudget:
    @given(st.lists(st.integers(0, 100)), st.integers(0, 500))
    def test_what_is_kept_fits_and_what_is_not_would_not(self, sizes: list[int], budget: int) -> None:
        items = list(enumerate(sizes))

        kept = within_budget(items, lambda item: item[1], budget)

        assert sum(size for _, size in kept) <= budget
        assert kept == sorted(kept)
        for index, size in set(items) - set(kept):
            assert sum(taken for place, taken in kept if place < index) + size > budget


class TestAdmission:
    @given(st.text(min_size=1, max_size=20), st.sampled_from(["acme", "other"]), st.sampled_from(["/a", "/b"]))
    def test_ids_follow_from_the_identity_alone(self, event_id: str, tenant_id: str, source: str) -> None:
        origin = provenance(id=event_id, tenant_id=tenant_id, source=source)

        assert origin.memory_id() == provenance(id=event_id, tenant_id=tenant_id, source=source).memory_id()
        assert origin.memory_id() != provenance(id=event_id, tenant_id=tenant_id, source=source + "x").memory_id()
        assert origin.memory_id() != provenance(id=event_id, tenant_id=tenant_id + "x", source=source).memory_id()
        assert origin.memory_id(0) != origin.memory_id(1)

    def test_a_message_keeps_what_was_said_and_when(self) -> None:
        said = datetime(2025, 5, 4, tzinfo=UTC)
        data = MessagePublished(conversation_id="c", role="assistant", content="Hi", speaker="Bot", occurred_at=said, importance=0.9)

        memory = admission.message(data, provenance(sequence=7))

        assert (memory.occurred_at, memory.importance, memory.ordinal, memory.series) == (said, 0.9, 7, "conversation:c")
        assert admission.message(data.model_copy(update={"occurred_at": None}), provenance()).occurred_at == NOW

    def test_a_document_becomes_chunks_with_their_offsets(self) -> None:
        text = "One sentence after the other. " * 200

        found = admission.document(DocumentPublished(document_id="d", content=text, title="T"), provenance())

        assert len(found) > 1
        assert [text[memory.start : memory.end] for memory in found] == [memory.text for memory in found]
        assert [memory.chunk_index for memory in found] == list(range(len(found)))
        assert {memory.chunk_count for memory in found} == {len(found)}
        assert len({admission.ordering_key(memory) for memory in found}) == 1

    def test_an_entity_is_described_in_words(self) -> None:
        data = EntityPublished(entity_id="ada", name="Ada", kind="person", aliases=("Countess",), description="Wrote programs.")

        entity, memory = admission.entity(data, provenance())

        assert memory.text == "Ada (person), also called Countess: Wrote programs."
        assert entity.memory_id == memory.id
        recorded = admission.recorded(memory, **admission.entity_details(data))
        assert (recorded.entity_id, recorded.entity_kind, recorded.aliases) == ("ada", "person", ("Countess",))

    def test_a_relation_has_no_text_and_stays_with_its_source(self) -> None:
        data = RelationPublished(source_entity_id="ada", relation="knows", target_entity_id="bob", weight=0.5)

        relation, memory = admission.relation(data, provenance())

        assert memory.text is None
        assert relation.weight == 0.5
        assert memory.series is None
        assert admission.recorded(memory, **admission.relation_details(data)).target_entity_id == "bob"
        assert admission.ordering_key(memory, "ada") == admission.ordering_key(admission.entity(_ada(), provenance())[1])

    def test_sealed_content_is_refused(self) -> None:
        sealed = MessagePublished(conversation_id="c", role="user", content=Sealed(key_id="k", nonce="n", ciphertext="c"))

        with pytest.raises(InvalidError, match="sealed") as refused:
            admission.message(sealed, provenance())
        assert refused.value.code == "sealed_content"


def _ada() -> EntityPublished:
    return EntityPublished(entity_id="ada", name="Ada", kind="person")


class TestGrounding:
    @pytest.mark.parametrize(
        ("messages", "asked"),
        [
            ((ChatMessage(role="user", content="first"), ChatMessage(role="assistant", content="no"), ChatMessage(role="tool")), "first"),
            ((ChatMessage(role="user", content="first"), ChatMessage(role="user", content="second")), "second"),
            ((ChatMessage(role="user", content=({"type": "text", "text": "part"}, {"type": "image_url"})),), "part"),
            ((ChatMessage(role="system", content="rules"),), ""),
        ],
    )
    def test_the_last_user_text_is_the_question(self, messages: tuple[ChatMessage, ...], asked: str) -> None:
        assert grounding.question(_request(messages=messages)) == asked

    def test_a_query_that_is_given_wins_and_a_prompt_is_one(self) -> None:
        assert grounding.question(_request(prompt="the prompt")) == "the prompt"
        assert grounding.question(_request(prompt="the prompt", memory={"query": "this"})) == "this"

    def test_unknown_encodings_are_estimated(self) -> None:
        assert grounding.fitting([], "unknown", 10) == []


def _request(**values: Any) -> GenerationRequested:
    model = ModelReference(model_id="m", provider="p", capability="chat", encoding="o200k_base", template="plain", exact=True)
    grounded = MemoryGrounding(**values.pop("memory", {}))
    return GenerationRequested(generation_id="g", model=model, memory=grounded, reply_partition=0, **values)
