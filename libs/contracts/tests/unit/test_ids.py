from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.contracts.ids import aggregate_key, body_digest, derived_id, derived_id_text, identity_digest, uuid7

pytestmark = pytest.mark.unit


@given(st.integers(min_value=0, max_value=2**48 - 1))
def test_uuid7_carries_its_time_version_and_variant(milliseconds: int) -> None:
    value = uuid7(milliseconds)
    assert (value.int >> 80, value.version, value.variant) == (milliseconds, 7, "specified in RFC 4122")


@given(st.integers(min_value=0, max_value=2**48 - 1), st.text(max_size=20), st.integers(min_value=0, max_value=10**6))
def test_a_derived_id_repeats_and_keeps_the_parents_time(milliseconds: int, step: str, index: int) -> None:
    parent = uuid7(milliseconds)
    derived = derived_id(parent, step, index)
    assert derived == derived_id(str(parent), step, index)
    assert (derived.int >> 80, derived.version) == (milliseconds, 8)


@given(st.text(max_size=40), st.text(max_size=10), st.integers(min_value=0, max_value=99))
def test_derived_ids_differ_by_parent_step_and_index(parent: str, step: str, index: int) -> None:
    first = derived_id(parent, step, index)
    assert (
        len({first, derived_id(parent, step, index + 1), derived_id(parent, step + "x", index), derived_id(parent + "x", step, index)}) == 4
    )


@given(st.uuids(), st.text(max_size=10))
def test_a_derived_id_is_the_same_however_the_parent_is_written(parent: UUID, step: str) -> None:
    """Ids that were derived before must be derived again: the time is the parent's in every spelling that UUID knows."""
    for written in (str(parent), parent.hex, str(parent).upper(), parent.urn, f"{{{parent}}}"):
        derived = derived_id(written, step)
        assert derived.int >> 80 == parent.int >> 80
        assert derived_id_text(written, step) == str(derived)


def test_ids_derived_by_earlier_versions_are_derived_again() -> None:
    assert derived_id_text("0198c0de-0000-7000-8000-000000000001", "recorded", 2) == "0198c0de-0000-89d6-9c1d-9b84e7cbf8bc"
    assert derived_id_text("order/17 é", "admit") == "e018c211-1fd9-890c-809b-65e5c506cadd"


def test_a_producers_own_id_may_be_any_text() -> None:
    assert isinstance(derived_id("order/17 é", "admit"), UUID)


def test_identity_separates_its_parts() -> None:
    assert identity_digest("a", "bc", "d") != identity_digest("ab", "c", "d")
    assert len(identity_digest("a", "b", "c")) == len(body_digest(b"x")) == 16


def test_a_key_shows_nothing_of_what_it_is_made_of() -> None:
    key = aggregate_key("acme", "conversation", "mara@example.org")
    assert len(key) == 32
    assert b"mara" not in key
    assert key != aggregate_key("other", "conversation", "mara@example.org")
