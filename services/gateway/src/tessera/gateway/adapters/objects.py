"""Uploaded datasets: the file in the object store, its description in Postgres."""

import asyncio
import hashlib
from typing import Any, BinaryIO

from sqlalchemy import text

from tessera.contracts.events import DatasetReference
from tessera.gateway.domain.errors import ApiError
from tessera.storage import Database, ObjectStore

_PIECE = 1024 * 1024

_INSERT = text("""
    INSERT INTO datasets (tenant_id, id, object_key, format, size_bytes, sha256)
    VALUES (:tenant_id, :id, :object_key, :format, :size_bytes, :sha256)
    ON CONFLICT (tenant_id, id) DO NOTHING
""")
_FIND = text("SELECT id, object_key, format, size_bytes, sha256 FROM datasets WHERE tenant_id = :tenant_id AND id = :id")


class StoredDatasets:
    """Implements `ports.Datasets`."""

    def __init__(self, database: Database, store: ObjectStore) -> None:
        self._database = database
        self._store = store

    async def save(self, tenant_id: str, dataset_id: str, file_format: str, file: BinaryIO) -> DatasetReference:
        """First the object, named by its content, then the row: a crash between leaves an object that nothing names."""
        size, digest = await asyncio.to_thread(_measured, file)
        if size == 0:
            raise ApiError(400, "empty_file", "The file is empty.", param="file")
        key = f"datasets/{tenant_id}/{digest}.{file_format}"
        await self._store.put(key, file)
        values = {"id": dataset_id, "object_key": key, "format": file_format, "size_bytes": size, "sha256": digest}
        async with self._database.writing(tenant_id) as connection:
            await connection.execute(_INSERT, {"tenant_id": tenant_id, **values})
            row = (await connection.execute(_FIND, {"tenant_id": tenant_id, "id": dataset_id})).mappings().one()
        return _same(_reference(row), digest)

    async def find(self, tenant_id: str, dataset_id: str) -> DatasetReference | None:
        """None where this tenant has no such dataset."""
        async with self._database.reading(tenant_id) as connection:
            row = (await connection.execute(_FIND, {"tenant_id": tenant_id, "id": dataset_id})).mappings().one_or_none()
        return None if row is None else _reference(row)


def _measured(file: BinaryIO) -> tuple[int, str]:
    """Size and SHA-256; leaves the file at its beginning. Blocks."""
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while piece := file.read(_PIECE):
        digest.update(piece)
        size += len(piece)
    file.seek(0)
    return size, digest.hexdigest()


def _reference(row: Any) -> DatasetReference:
    fields = dict(row)
    return DatasetReference(dataset_id=fields.pop("id"), **fields)


def _same(stored: DatasetReference, digest: str) -> DatasetReference:
    if stored.sha256 != digest:
        raise ApiError(409, "idempotency_key_reused", "This Idempotency-Key was used with another file.")
    return stored
