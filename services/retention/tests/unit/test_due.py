"""What is due, under any policy and at any time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tessera.contracts.events import MemoryKind, RetentionPolicy
from tessera.retention.domain import MemoryMetadata, PlannedItem, archive_chunk, due, matching_rule

pytestmark = pytest.mark.unit

NOW = datetime(2026, 6, 1, tzinfo=UTC)
KINDS = get_args(MemoryKind)

fractions = st.floats(min_value=0, max_value=1)
policies = st.builds(
    RetentionPolicy,
    max_age_days=st.integers(1, 400),
    importance_threshold=st.none() | fractions,
    kinds=st.lists(st.sampled_from(KINDS), unique=True, max_size=4).map(tuple),
)
memories = st.lists(
    st.builds(
        MemoryMetadata,
        memory_id=st.uuids().map(str),
        kind=st.sampled_from(KINDS),
        occurred_at=st.timedeltas(min_value=timedelta(days=-10), max_value=timedelta(days=500)).map(lambda age: NOW - age),
        importance=fractions,
        version=st.integers(1, 5),
        archived=st.booleans(),
    ),
    unique_by=lambda memory: memory.memory_id,
    max_size=30,
)


def _ids(found: list[MemoryMetadata], policy: RetentionPolicy, now: datetime) -> set[str]:
    return {item.memory.memory_id for item in due(found, policy, now)}


def _memory(**changes: object) -> MemoryMetadata:
    values: dict[str, object] = {
        "memory_id": "m",
        "kind": "message",
        "occurred_at": NOW - timedelta(days=10),
        "importance": 0.5,
        "version": 1,
    }
    return MemoryMetadata(**{**values, **changes})  # type: ignore[arg-type]


@given(memories, policies, st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=900)))
def test_what_is_due_stays_due_as_time_passes(found: list[MemoryMetadata], policy: RetentionPolicy, later: timedelta) -> None:
    assert _ids(found, policy, NOW) <= _ids(found, policy, NOW + later)


@given(memories, policies, st.integers(1, 400))
def test_a_shorter_age_names_no_fewer(found: list[MemoryMetadata], policy: RetentionPolicy, days: int) -> None:
    shorter = policy.model_copy(update={"max_age_days": min(days, policy.max_age_days or days)})
    assert _ids(found, policy, NOW) <= _ids(found, shorter, NOW)


@given(memories, policies)
def test_nothing_archived_or_of_another_kind_is_ever_due(found: list[MemoryMetadata], policy: RetentionPolicy) -> None:
    for item in due(found, policy, NOW):
        assert not item.memory.archived
        assert not policy.kinds or item.memory.kind in policy.kinds


@given(memories, policies, st.randoms())
def test_pages_and_order_do_not_change_what_is_due(found: list[MemoryMetadata], policy: RetentionPolicy, random: object) -> None:
    whole = _ids(found, policy, NOW)
    random.shuffle(found)  # type: ignore[attr-defined]
    half = len(found) // 2
    assert _ids(found[:half], policy, NOW) | _ids(found[half:], policy, NOW) == whole


@given(memories, policies)
def test_an_unchanged_plan_is_archived_exactly(found: list[MemoryMetadata], policy: RetentionPolicy) -> None:
    named = list(due(found, policy, NOW))
    chunk = archive_chunk(PlannedItem(item.memory.memory_id, item.memory.version, item.memory.version, archived=False) for item in named)
    assert [(item.memory_id, item.version) for item in chunk.requested] == [(i.memory.memory_id, i.memory.version) for i in named]
    assert not chunk.skipped


def test_exactly_the_maximum_age_stays() -> None:
    policy = RetentionPolicy(max_age_days=10)
    assert matching_rule(_memory(), policy, NOW) is None
    assert matching_rule(_memory(), policy, NOW + timedelta(seconds=1)) == "max_age"


def test_the_threshold_itself_is_archived() -> None:
    policy = RetentionPolicy(importance_threshold=0.5)
    assert matching_rule(_memory(), policy, NOW) == "importance_threshold"
    assert matching_rule(_memory(importance=0.51), policy, NOW) is None


def test_age_is_named_where_both_rules_match() -> None:
    policy = RetentionPolicy(max_age_days=1, importance_threshold=1.0)
    assert matching_rule(_memory(), policy, NOW) == "max_age"


def test_a_policy_without_any_rule_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_age_days"):
        RetentionPolicy()


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (PlannedItem("m", 1, None, archived=False), "memory_unknown"),
        (PlannedItem("m", 1, 2, archived=True), "already_archived"),
        (PlannedItem("m", 1, 2, archived=False), "version_changed"),
    ],
)
def test_a_memory_that_changed_since_it_was_named_is_skipped(item: PlannedItem, reason: str) -> None:
    chunk = archive_chunk([item])
    assert chunk.requested == ()
    assert chunk.skipped == {"m": reason}
