"""Compositions in Postgres, under row-level security."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.contracts.errors import InvalidError
from tessera.storage import Database
from tessera.tokenizer.domain.composition import Composed, Composition, rebuild
from tessera.tokenizer.ports import Provenance

_PROVENANCE = text(
    """
    INSERT INTO composition_source (tenant_id, composition_id, kind, source_id, subject_id)
    VALUES (:tenant, :id, :kind, :source_id, :subject_id) ON CONFLICT DO NOTHING
    """
)
_EXISTS = text("SELECT EXISTS (SELECT FROM composition WHERE tenant_id = :tenant AND id = :id)")
# Sorted by the caller: two transactions that store the same words wait for each other in one order, never in a circle.
_COMPOSITIONS = text(
    """
    INSERT INTO composition (tenant_id, id, child_count, byte_count)
    SELECT :tenant, id, child_count, byte_count
    FROM unnest(CAST(:ids AS bytea[]), CAST(:child_counts AS integer[]), CAST(:byte_counts AS integer[]))
        AS given (id, child_count, byte_count)
    ON CONFLICT DO NOTHING
    RETURNING id
    """
)
_CHILDREN = text(
    """
    INSERT INTO composition_child (tenant_id, composition_id, ordinal, child_id)
    SELECT :tenant, composition_id, ordinal, child_id
    FROM unnest(CAST(:ids AS bytea[]), CAST(:ordinals AS integer[]), CAST(:children AS bytea[]))
        AS given (composition_id, ordinal, child_id)
    """
)
_CONFLICTS = text(
    """
    SELECT stored.id
    FROM unnest(CAST(:ids AS bytea[]), CAST(:child_counts AS integer[]), CAST(:byte_counts AS integer[]))
        AS given (id, child_count, byte_count)
    JOIN composition AS stored ON stored.tenant_id = :tenant AND stored.id = given.id
    WHERE (stored.child_count, stored.byte_count) <> (given.child_count, given.byte_count)
    LIMIT 1
    """
)
_TREE = text(
    """
    WITH RECURSIVE part (id) AS (
        SELECT id FROM composition WHERE tenant_id = :tenant AND id = :root
        UNION
        SELECT child.child_id FROM part
        JOIN composition_child AS child ON child.tenant_id = :tenant AND child.composition_id = part.id
    )
    SELECT part.id, ARRAY (
        SELECT child_id FROM composition_child AS child WHERE child.tenant_id = :tenant AND child.composition_id = part.id ORDER BY ordinal
    ) AS children
    FROM part JOIN composition AS stored ON stored.tenant_id = :tenant AND stored.id = part.id
    """
)
_TOKENS = text("SELECT id, bytes FROM token WHERE id = ANY(CAST(:ids AS bytea[]))")


class PostgresVocabulary:
    """The Vocabulary that is kept in Postgres; everything runs as the client role, to which only the tenant's rows exist."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def store(self, tenant_id: str, composed: Composed, provenance: Provenance) -> None:
        """See Vocabulary.store."""
        async with self._database.writing(tenant_id) as connection:
            if composed.compositions and not await connection.scalar(_EXISTS, {"tenant": tenant_id, "id": composed.root}):
                await _store_compositions(connection, tenant_id, composed.compositions)
            await connection.execute(
                _PROVENANCE,
                {
                    "tenant": tenant_id,
                    "id": composed.root,
                    "kind": provenance.kind,
                    "source_id": provenance.source_id,
                    "subject_id": provenance.subject_id,
                },
            )

    async def text(self, tenant_id: str, composition_id: bytes) -> bytes:
        """See Vocabulary.text."""
        async with self._database.reading(tenant_id) as connection:
            rows = await connection.execute(_TREE, {"tenant": tenant_id, "root": composition_id})
            children: dict[bytes, Sequence[bytes]] = {row.id: row.children for row in rows}
            leaves = {part for parts in children.values() for part in parts} | {composition_id}
            tokens = await _tokens(connection, leaves - children.keys())
        if not children and not tokens:
            raise InvalidError("composition_not_found", f"No composition {composition_id.hex()} is stored.", "composition_id")
        return rebuild(composition_id, children, tokens)


async def _store_compositions(connection: AsyncConnection, tenant_id: str, compositions: Mapping[bytes, Composition]) -> None:
    given = _columns(tenant_id, compositions)
    created = set((await connection.execute(_COMPOSITIONS, given)).scalars())
    if len(created) < len(compositions):
        await _refuse_conflicts(connection, given)
    await connection.execute(_CHILDREN, _child_columns(tenant_id, {key: compositions[key] for key in sorted(created)}))


async def _refuse_conflicts(connection: AsyncConnection, given: Mapping[str, object]) -> None:
    conflicting = await connection.scalar(_CONFLICTS, given)
    if conflicting is not None:
        raise InvalidError("composition_conflict", f"{conflicting.hex()} is stored with another content.")


def _columns(tenant_id: str, compositions: Mapping[bytes, Composition]) -> dict[str, object]:
    ids = sorted(compositions)
    return {
        "tenant": tenant_id,
        "ids": ids,
        "child_counts": [len(compositions[key].children) for key in ids],
        "byte_counts": [compositions[key].size for key in ids],
    }


def _child_columns(tenant_id: str, compositions: Mapping[bytes, Composition]) -> dict[str, object]:
    columns: dict[str, list[object]] = defaultdict(list)
    for key, composition in compositions.items():
        for ordinal, child in enumerate(composition.children):
            columns["ids"].append(key)
            columns["ordinals"].append(ordinal)
            columns["children"].append(child)
    return {"tenant": tenant_id, "ids": columns["ids"], "ordinals": columns["ordinals"], "children": columns["children"]}


async def _tokens(connection: AsyncConnection, ids: set[bytes]) -> dict[bytes, bytes]:
    rows = await connection.execute(_TOKENS, {"ids": list(ids)})
    return {row.id: row.bytes for row in rows}
