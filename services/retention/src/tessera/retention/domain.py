"""What is due for archiving, and what a sweep may do. Pure rules: no I/O, no clock, no database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, Literal

from tessera.contracts.events import ArchivedItem, MemoryKind, RetentionPolicy

MAXIMUM_ARCHIVE_CHUNK: Final = 200
"""Memories in one ArchiveRequested; the contract allows no more."""

Rule = Literal["max_age", "importance_threshold"]
SweepState = Literal["planned", "running", "completed", "failed"]


class ItemState(StrEnum):
    """How far one memory of a sweep has come."""

    PLANNED = "planned"
    """Named, nothing asked for."""
    REQUESTED = "requested"
    """memory was asked to archive it."""
    ARCHIVED = "archived"
    """memory confirmed."""
    SKIPPED = "skipped"
    """It had changed since it was named, so it was left alone."""


@dataclass(frozen=True, slots=True)
class MemoryMetadata:
    """What retention knows of a memory: never its text."""

    memory_id: str
    kind: MemoryKind
    occurred_at: datetime
    importance: float
    version: int
    archived: bool = False


@dataclass(frozen=True, slots=True)
class DueMemory:
    """A memory that a policy names, and the first rule that named it."""

    memory: MemoryMetadata
    rule: Rule


def due(memories: Iterable[MemoryMetadata], policy: RetentionPolicy, now: datetime) -> Iterator[DueMemory]:
    """The memories that `policy` archives at `now`, in the order given.

    Older than `max_age_days`, or at most as important as `importance_threshold`; either is enough. Monotone: what is
    due stays due as time passes, until it is archived or gets a new version.
    """
    for memory in memories:
        rule = matching_rule(memory, policy, now)
        if rule is not None:
            yield DueMemory(memory, rule)


def matching_rule(memory: MemoryMetadata, policy: RetentionPolicy, now: datetime) -> Rule | None:
    """The rule under which `memory` is due at `now`; None if it stays. Age is named first where both match."""
    if memory.archived or (policy.kinds and memory.kind not in policy.kinds):
        return None
    if policy.max_age_days is not None and now - memory.occurred_at > timedelta(days=policy.max_age_days):
        return "max_age"
    if policy.importance_threshold is not None and memory.importance <= policy.importance_threshold:
        return "importance_threshold"
    return None


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """A named memory, and what the projection knows of it now: None where it knows nothing any more."""

    memory_id: str
    version: int
    current_version: int | None
    archived: bool


@dataclass(frozen=True, slots=True)
class ArchiveChunk:
    """What to ask memory for, and what has changed since it was named and stays as it is."""

    requested: tuple[ArchivedItem, ...]
    skipped: Mapping[str, str]
    """Memory id → reason."""


def archive_chunk(items: Iterable[PlannedItem]) -> ArchiveChunk:
    """Splits planned items into those still as they were named and those that are not."""
    requested: list[ArchivedItem] = []
    skipped: dict[str, str] = {}
    for item in items:
        reason = stale_reason(item)
        if reason is None:
            requested.append(ArchivedItem(memory_id=item.memory_id, version=item.version))
        else:
            skipped[item.memory_id] = reason
    return ArchiveChunk(tuple(requested), skipped)


def stale_reason(item: PlannedItem) -> str | None:
    """Why a named memory must not be archived as it was named; None if it still may."""
    if item.current_version is None:
        return "memory_unknown"
    if item.archived:
        return "already_archived"
    return "version_changed" if item.current_version != item.version else None
