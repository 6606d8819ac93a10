"""API keys: form, checksum, hash."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.gateway.domain import keys
from tessera.gateway.domain.keys import ALPHABET, ApiKey, StoredKey

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 21, tzinfo=UTC)
letters = st.sampled_from(ALPHABET)
api_keys = st.builds(
    ApiKey,
    st.sampled_from(keys.ENVIRONMENTS),
    st.text(letters, min_size=keys.ID_LENGTH, max_size=keys.ID_LENGTH),
    st.text(letters, min_size=keys.SECRET_LENGTH, max_size=keys.SECRET_LENGTH),
)


@settings(deadline=None)
@given(api_keys)
def test_a_key_survives_being_shown_and_read(key: ApiKey) -> None:
    assert keys.parse(key.reveal()) == key


@settings(deadline=None)
@given(api_keys, st.integers(min_value=0), st.characters())
def test_a_changed_character_is_noticed(key: ApiKey, position: int, other: str) -> None:
    text = key.reveal()
    place = position % len(text)
    changed = text[:place] + other + text[place + 1 :]
    assert changed == text or keys.parse(changed) is None


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_presented(text: str) -> None:
    assert keys.parse(text) is None


@settings(deadline=None)
@given(api_keys, api_keys, st.binary(min_size=1), st.binary(min_size=1))
def test_only_the_secret_under_its_pepper_matches(key: ApiKey, other: ApiKey, pepper: bytes, another: bytes) -> None:
    stored = StoredKey("t", key.id, keys.digest(key.secret, pepper), frozenset())
    assert keys.matches(key, stored, pepper, NOW)
    assert keys.matches(other, stored, pepper, NOW) == (other.secret == key.secret)
    # HMAC pads short keys with zeros, so peppers that differ only in trailing zeros are the same.
    assert keys.matches(key, stored, another, NOW) == (another.rstrip(b"\0") == pepper.rstrip(b"\0") or another == pepper)


@pytest.mark.parametrize(("former_until", "opens"), [(NOW + timedelta(seconds=1), True), (NOW, False), (NOW - timedelta(days=1), False)])
def test_the_secret_before_a_rotation_opens_until_its_time_is_over(former_until: datetime, opens: bool) -> None:
    former, current, stranger = (keys.generate("test") for _ in range(3))
    digests = [keys.digest(key.secret, b"p") for key in (current, former)]
    stored = StoredKey("t", current.id, digests[0], frozenset(), former_digest=digests[1], former_until=former_until)
    assert keys.matches(current, stored, b"p", NOW)
    assert keys.matches(former, stored, b"p", NOW) == opens
    assert not keys.matches(stranger, stored, b"p", NOW)


def test_a_new_key_is_new_and_hides_its_secret() -> None:
    first, second = keys.generate("live"), keys.generate("live")
    assert first != second
    assert first.secret not in repr(first)
    assert first.reveal().startswith(f"tsr_live_{first.id}_")
    with pytest.raises(ValueError, match="environment"):
        keys.generate("prod")


@pytest.mark.parametrize(
    ("expires", "revoked", "usable"),
    [(None, None, True), (NOW + timedelta(1), None, True), (NOW, None, False), (None, NOW, False), (NOW + timedelta(1), NOW, False)],
)
def test_when_a_key_is_usable(expires: datetime | None, revoked: datetime | None, usable: bool) -> None:
    assert StoredKey("t", "k", b"", frozenset(), expires, revoked).usable(NOW) is usable
