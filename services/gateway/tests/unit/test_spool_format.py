"""Segments: whatever a crash or a bad disk leaves of one, what is whole is read again and nothing else."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.gateway.domain import spool
from tessera.gateway.domain.spool import AcceptedEvent

pytestmark = pytest.mark.unit

SYNC = bytes(range(16))
NOW = datetime(2026, 11, 21, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
events = st.builds(
    AcceptedEvent,
    event_id=texts,
    tenant_id=texts,
    topic=texts,
    key=st.binary(max_size=32),
    headers=st.lists(st.tuples(texts, st.binary(max_size=20)), max_size=3).map(tuple),
    value=st.binary(max_size=60),
    accepted_at=st.datetimes(timezones=st.just(UTC)),
)


def event(name: str, value: bytes = b"{}") -> AcceptedEvent:
    return AcceptedEvent(name, "acme", "ingest.acme", b"key", (("ce_id", name.encode()), ("ce_type", b"t")), value, NOW)


def segment(found: list[AcceptedEvent], sync: bytes = SYNC) -> tuple[bytes, list[int]]:
    """The file, and where each frame ends."""
    data, ends = spool.header(sync), []
    for one in found:
        data += spool.framed(sync, spool.packed(one))
        ends.append(len(data))
    return data, ends


@given(st.lists(events, max_size=5), st.data())
def test_a_file_cut_at_any_byte_gives_exactly_the_whole_records_before_the_cut(found: list[AcceptedEvent], data: st.DataObject) -> None:
    whole, ends = segment(found)
    cut = data.draw(st.integers(0, len(whole)))
    recovery = spool.recover(whole[:cut])
    count = sum(end <= cut for end in ends)
    assert [frame.event for frame in recovery.frames] == found[:count]
    assert recovery.damaged == ()
    assert recovery.end == (0 if cut < spool.HEADER_BYTES else [spool.HEADER_BYTES, *ends][count])


@given(st.lists(events, min_size=2, max_size=5), st.data())
def test_a_changed_byte_costs_its_own_record_at_most(found: list[AcceptedEvent], data: st.DataObject) -> None:
    whole, ends = segment(found)
    at = data.draw(st.integers(spool.HEADER_BYTES, ends[-2] - 1))
    broken = bytearray(whole)
    broken[at] ^= data.draw(st.integers(1, 255))
    hit = sum(end <= at for end in ends)
    start = [spool.HEADER_BYTES, *ends][hit]
    recovery = spool.recover(bytes(broken))
    assert [frame.event for frame in recovery.frames] == found[:hit] + found[hit + 1 :]
    assert (recovery.damaged, recovery.end) == (((start, ends[hit]),), len(whole))


@given(st.lists(events, max_size=4))
def test_a_frame_is_read_from_its_place(found: list[AcceptedEvent]) -> None:
    whole, _ = segment(found)
    frames = spool.recover(whole).frames
    assert [spool.read_frame(whole[frame.offset : frame.offset + frame.length], SYNC) for frame in frames] == found


def test_the_content_of_an_event_never_passes_for_a_frame() -> None:
    inner = spool.framed(b"another marker!!", spool.packed(event("forged")))
    whole, _ = segment([event("outer", inner + b"more")])
    assert spool.recover(whole[:-1]).frames == ()
    guessed, _ = segment([event("outer", spool.framed(SYNC, spool.packed(event("forged"))) + b"more")])
    assert [frame.event.event_id for frame in spool.recover(guessed[:-1]).frames] == ["forged"], "this is what the random marker prevents"


@pytest.mark.parametrize("data", [b"something else altogether", bytes(64), b"TESSPOOL2\n" + bytes(40)])
def test_a_file_that_is_no_segment_is_damaged_as_a_whole(data: bytes) -> None:
    recovery = spool.recover(data)
    assert (recovery.frames, recovery.damaged, recovery.end) == ((), ((0, len(data)),), len(data))


@pytest.mark.parametrize("payload", [b"", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x01{"])
def test_a_payload_that_is_no_event_is_said_so(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"payload|JSON|Expecting"):
        spool.unpacked(payload)
    assert spool.recover(spool.header(SYNC) + spool.framed(SYNC, payload)).frames == ()


def test_a_broken_frame_is_not_read() -> None:
    with pytest.raises(ValueError, match="broken"):
        spool.read_frame(spool.framed(SYNC, spool.packed(event("a")))[:-1], SYNC)


def test_an_expired_event_carries_the_deadline_that_it_missed_and_nothing_else_changes() -> None:
    late = event("a").expired(timedelta(hours=1)).expired(timedelta(hours=2))
    assert [value for name, value in late.headers if name == "ce_deadline"] == [b"2026-11-21T02:00:00Z"]
    assert (late.event_id, late.value, late.event_type) == ("a", b"{}", "t")
