"""Rows to objects and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from tessera.bus import Origin
from tessera.contracts.errors import Problem
from tessera.contracts.events import RetentionPolicy
from tessera.retention.domain import DueMemory, MemoryMetadata
from tessera.retention.ports import Sweep


def origin_json(origin: Origin) -> str:
    """An origin as a job row stores it."""
    return json.dumps(asdict(origin))


def origin_of(value: str | dict[str, Any]) -> Origin:
    """An origin as a job row stored it."""
    return Origin(**_decoded(value))


def policy_of(value: str | dict[str, Any]) -> RetentionPolicy:
    """A stored policy."""
    return RetentionPolicy.model_validate(_decoded(value))


def _decoded(value: str | dict[str, Any]) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(value) if isinstance(value, str) else value
    return decoded


def sweep_of(row: Any) -> Sweep:
    """A row of `sweeps`."""
    return Sweep(
        tenant_id=row.tenant_id,
        sweep_id=row.sweep_id,
        dry_run=row.dry_run,
        plan_id=row.plan_id,
        state=row.state,
        policy_version=row.policy_version,
        policy=policy_of(row.policy) if row.policy is not None else None,
        as_of=row.as_of,
        origin=origin_of(row.origin),
        cursor=row.cursor,
        planned=row.planned_at is not None,
        chunks=row.chunks,
        requested_at=row.requested_at,
        problem=Problem.model_validate(_decoded(row.problem)) if row.problem is not None else None,
    )


def memory_of(row: Any) -> MemoryMetadata:
    """A row of `memories` or of `sweep_items`."""
    return MemoryMetadata(row.memory_id, row.kind, row.occurred_at, row.importance, row.version)


def named_of(row: Any) -> DueMemory:
    """A row of `sweep_items`."""
    return DueMemory(memory_of(row), row.rule)
