"""How fresh an answer has to be, and how fresh it was (docs/consistency.md)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from tessera.contracts.base import EventData, Moment, Record, RequestData
from tessera.contracts.errors import Problem

ConsistencyLevel = Literal["eventual", "bounded", "read_your_writes", "strong"]
SearchStage = Literal["words", "vectors"]
"""A memory is found by its words first, and by its meaning when the embedder has made its vectors."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Offset = Annotated[int, Field(ge=0, le=2**63 - 1)]
PartitionNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
TopicName = Annotated[str, StringConstraints(min_length=1, max_length=249)]


class LogPlace(Record):
    """One record's place in the log."""

    topic: TopicName
    partition: PartitionNumber
    offset: Offset


class AwaitedWrite(Record):
    """An event by its identity and body, each as the first 16 bytes of a SHA-256 in hexadecimal."""

    identity: Digest
    body: Digest
    place: Annotated[LogPlace | None, Field(description="Where it is, as far as its producer was told.")] = None


class LogEnd(Record):
    """Everything in a partition below `next_offset`."""

    topic: TopicName
    partition: PartitionNumber
    next_offset: Offset


class ReadConsistency(Record):
    """What the answer must hold, and how long may be waited for it.

    `strong` and `maximum_age_seconds` have the reader look where the log ends, now or at most so long ago.
    """

    level: ConsistencyLevel
    writes: Annotated[tuple[AwaitedWrite, ...], Field(max_length=2_000)] = ()
    ends: Annotated[tuple[LogEnd, ...], Field(max_length=1_000)] = ()
    maximum_age_seconds: Annotated[float | None, Field(ge=0, le=86_400, allow_inf_nan=False)] = None
    stage: Annotated[SearchStage | None, Field(description="By what it must be found; none: it is enough that it was applied.")] = "words"
    wait_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 0.0


class Freshness(Record):
    """How fresh an answer is, read in the same snapshot as the answer.

    Anything but `satisfied` comes without an answer: `behind` (not read or not indexed yet), `pending` (parked, to be tried again) or
    `refused`.
    """

    standing: Literal["satisfied", "behind", "pending", "refused"]
    as_of: Annotated[Moment, Field(description="Whatever was applied by then is in the answer.")]
    ends: Annotated[tuple[LogEnd, ...], Field(description="Below these everything was applied or refused.")] = ()
    searchable: Annotated[
        SearchStage | None,
        Field(description="What the awaited can be found by, or everything where nothing was awaited; none: not even by words."),
    ] = None
    reason: Annotated[Problem | None, Field(description="Why something is pending or refused.")] = None
    awaited: Annotated[
        tuple[LogEnd, ...], Field(description="The ends that had to be reached: whoever asks again asks for these, not for later ones.")
    ] = ()
    waiting_may_help: bool = True


class FreshnessInspected(RequestData):
    """Is memory as fresh as this? Answered when it is, or when it is known that it will not be in time."""

    event_type: ClassVar[str] = "tessera.freshness.inspected.v1"

    consistency: ReadConsistency


class FreshnessReported(EventData):
    """How fresh memory is."""

    event_type: ClassVar[str] = "tessera.freshness.reported.v1"

    freshness: Freshness
