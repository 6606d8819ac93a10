"""The audit trail's events."""

import pytest

from tessera.contracts.events import MAXIMUM_AUDIT_PAGE, AuditActor, AuditDetail, AuditEntry, AuditRecorded, AuditReported, AuditTarget

pytestmark = pytest.mark.unit

_LARGEST_ANSWER = 512 * 1024
_COSTLY = "\x01"
"""Six bytes in JSON."""


def test_a_page_of_the_longest_entries_fits_into_an_answer() -> None:
    word = "a" * 32
    record = AuditRecorded(
        action=f"{word}.{word}",
        outcome="attempted",
        actor=AuditActor(kind=f"{word}.{word}", id=_COSTLY * 128, tenant="t" * 63),
        tenant="t" * 63,
        target=AuditTarget(kind=f"{word}.{word}", id=_COSTLY * 256),
        code="c" * 64,
        details=(AuditDetail(name=f"{word}.{word}", value=_COSTLY * 128),) * 2,
        client_address=":" * 64,
        request_id="r" * 128,
        count=10**9,
        occurred_at="2026-11-20T09:30:00.123456Z",  # type: ignore[arg-type]  # read as events are
    )
    page = AuditReported(entries=(AuditEntry(id="i" * 36, record=record),) * MAXIMUM_AUDIT_PAGE, next_cursor="c" * 256)
    assert len(page.model_dump_json().encode()) <= _LARGEST_ANSWER


@pytest.mark.parametrize("action", ["", "Key.create", "key.create.now", "key create"])
def test_an_action_is_a_noun_and_a_verb(action: str) -> None:
    with pytest.raises(ValueError, match="action"):
        AuditRecorded(action=action, outcome="succeeded", actor=AuditActor(kind="key"), occurred_at="2026-11-20T09:30:00Z")  # type: ignore[arg-type]
