"""Helpers for the SQL of this service."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import RowMapping

from tessera.memory.domain.records import Memory, Turn
from tessera.memory.ports import Vector

MEMORY_COLUMNS = (
    "tenant_id, id, kind, version, subject_id, origin_id, origin_digest, occurred_at, recorded_at, importance, text, conversation_id,"
    " role, speaker, document_id, title, chunk_index, chunk_count, start_offset, end_offset, entity_id, ordinal, metadata"
)


def vector_text(vector: Vector) -> str:
    """The text form of pgvector's vectors."""
    return "[" + ",".join(f"{value:.7g}" for value in vector) + "]"


def memory_row(memory: Memory) -> dict[str, Any]:
    """The values of a memory's row, by column."""
    row = {name: getattr(memory, name) for name in MEMORY_COLUMNS.split(", ") if name not in {"start_offset", "end_offset", "metadata"}}
    return {
        **row,
        "start_offset": memory.start,
        "end_offset": memory.end,
        "series": memory.series,
        "metadata": json.dumps(dict(memory.metadata), ensure_ascii=False),
    }


def memory_of(row: RowMapping) -> Memory:
    """The memory in a row of `MEMORY_COLUMNS`."""
    values: dict[str, Any] = dict(row)
    start, end = values.pop("start_offset"), values.pop("end_offset")
    metadata = values.pop("metadata")
    return Memory(**values, start=start, end=end, metadata=json.loads(metadata) if isinstance(metadata, str) else metadata)


def turn_of(values: RowMapping) -> Turn:
    """What of a memory's row is written into its indexed forms."""
    return Turn(occurred_at=values["occurred_at"], text=values["text"], said_by=values["speaker"] or values["role"], title=values["title"])
