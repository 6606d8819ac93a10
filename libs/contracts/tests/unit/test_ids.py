from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.contracts.ids import aggregate_key, body_digest, derived_id, identity_digest, uuid7

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
