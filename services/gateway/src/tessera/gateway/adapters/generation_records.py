"""What became of generations, and what was used, in Postgres."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import RowMapping, TextClause, text

from tessera.bus import BatchTransaction
from tessera.gateway.domain.records import Ended, GenerationRecord, Since, UsageRow
from tessera.gateway.ports import RecordPage, UsageQuestion
from tessera.storage import Database

_ACCEPT = text("""
    INSERT INTO generation_records AS record
        (tenant_id, id, model_id, asked_model, provider, capability, credential_id, subject_id, accepted_at, deadline, streamed,
         include_usage, include_obfuscation, reply_partition, reply_offset, look_at)
    VALUES (:tenant_id, :id, :model_id, :asked_model, :provider, :capability, :credential_id, :user, :accepted_at, :deadline, :streamed,
            :include_usage, :include_obfuscation, :partition, :offset, :look_at)
    ON CONFLICT (tenant_id, id) DO UPDATE SET
        accepted_at = excluded.accepted_at, deadline = excluded.deadline, streamed = excluded.streamed,
        include_usage = excluded.include_usage, include_obfuscation = excluded.include_obfuscation,
        reply_partition = excluded.reply_partition, reply_offset = excluded.reply_offset
    WHERE record.accepted_at IS NULL OR record.reply_partition IS NULL
""")
# The first end stands: whoever tells of a second one tells of the same.
_END = text("""
    INSERT INTO generation_records AS record
        (tenant_id, id, model_id, asked_model, provider, capability, credential_id, subject_id, accepted_at,
         outcome, finish_reason, problem, prompt_tokens, completion_tokens, usage_source, cost, ended_at)
    VALUES (:tenant_id, :id, :model_id, :asked_model, :provider, :capability, :credential_id, :user, :accepted_at,
            :outcome, :finish_reason, :problem, :prompt_tokens, :completion_tokens, :usage_source, :cost, :at)
    ON CONFLICT (tenant_id, id) DO UPDATE SET
        outcome = excluded.outcome, finish_reason = excluded.finish_reason, problem = excluded.problem,
        prompt_tokens = excluded.prompt_tokens, completion_tokens = excluded.completion_tokens,
        usage_source = excluded.usage_source, cost = excluded.cost, ended_at = excluded.ended_at
    WHERE record.ended_at IS NULL
""")
_COLUMNS: Final = """tenant_id, id, model_id, asked_model, provider, capability, credential_id, subject_id, accepted_at, deadline, streamed,
    include_usage, include_obfuscation, reply_partition, reply_offset, outcome, finish_reason, problem, prompt_tokens, completion_tokens,
    usage_source, cost, ended_at"""
_FIND = text(f"""
    SELECT {_COLUMNS} FROM generation_records WHERE tenant_id = :tenant_id AND id = :id AND accepted_at IS NOT NULL
""")  # noqa: S608
_OVERDUE = text(f"""
    UPDATE generation_records SET look_at = now() + CAST(:again AS interval)
    WHERE (tenant_id, id) IN (
        SELECT tenant_id, id FROM generation_records WHERE ended_at IS NULL AND look_at <= now()
        ORDER BY look_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ) RETURNING {_COLUMNS}
""")  # noqa: S608
_EXPIRE = text("""
    DELETE FROM generation_records WHERE (tenant_id, id) IN (
        SELECT tenant_id, id FROM generation_records WHERE counted AND ended_at < now() - CAST(:age AS interval)
        ORDER BY ended_at LIMIT :limit FOR UPDATE SKIP LOCKED
    )
""")
# The figures of one record, as both the sums and what is not in them yet have them. A cancelled generation is no error.
_FIGURES: Final = """tenant_id, CAST(coalesce(accepted_at, ended_at) AT TIME ZONE 'UTC' AS date) AS day,
    coalesce(credential_id, '') AS credential_id, model_id, 1 AS requests, CAST(outcome = 'failed' AS integer) AS errors,
    coalesce(prompt_tokens, 0) AS prompt_tokens, coalesce(completion_tokens, 0) AS completion_tokens, coalesce(cost, 0) AS cost,
    CAST(extract(epoch FROM ended_at - coalesce(accepted_at, ended_at)) * 1000 AS bigint) AS milliseconds"""
_SUMS: Final = """CAST(sum(requests) AS bigint) AS requests, CAST(sum(errors) AS bigint) AS errors,
    CAST(sum(prompt_tokens) AS bigint) AS prompt_tokens, CAST(sum(completion_tokens) AS bigint) AS completion_tokens,
    sum(cost) AS cost, CAST(sum(milliseconds) AS bigint) AS milliseconds"""
# One at a time, and always in the same order, so that no two wait for each other.
_COUNT = text(f"""
    WITH alone AS (SELECT pg_try_advisory_xact_lock(hashtextextended('tessera.gateway.usage', 0)) AS held),
    due AS (
        SELECT tenant_id, id FROM generation_records WHERE (SELECT held FROM alone) AND ended_at IS NOT NULL AND NOT counted
        ORDER BY ended_at LIMIT :limit FOR UPDATE
    ),
    taken AS (
        UPDATE generation_records AS record SET counted = true FROM due
        WHERE record.tenant_id = due.tenant_id AND record.id = due.id RETURNING record.*
    ),
    added AS (
        INSERT INTO usage_by_day AS total
            (tenant_id, day, credential_id, model_id, requests, errors, prompt_tokens, completion_tokens, cost, milliseconds)
        SELECT tenant_id, day, credential_id, model_id, {_SUMS} FROM (SELECT {_FIGURES} FROM taken) AS figures
        GROUP BY tenant_id, day, credential_id, model_id ORDER BY tenant_id, day, credential_id, model_id
        ON CONFLICT (tenant_id, day, credential_id, model_id) DO UPDATE SET
            requests = total.requests + excluded.requests, errors = total.errors + excluded.errors,
            prompt_tokens = total.prompt_tokens + excluded.prompt_tokens,
            completion_tokens = total.completion_tokens + excluded.completion_tokens,
            cost = total.cost + excluded.cost, milliseconds = total.milliseconds + excluded.milliseconds
    )
    SELECT count(*) FROM taken
""")  # noqa: S608
_GROUPS: Final = ("day", "credential_id", "model_id")


def _page(*, newest_first: bool) -> TextClause:
    """The order is part of the statement; all else is a parameter."""
    beyond, direction = ("<", "DESC") if newest_first else (">", "ASC")
    return text(f"""
        SELECT {_COLUMNS} FROM generation_records
        WHERE tenant_id = :tenant_id AND accepted_at IS NOT NULL
        AND (CAST(:model AS text) IS NULL OR asked_model = :model OR model_id = :model)
        AND (CAST(:credential_id AS text) IS NULL OR credential_id = :credential_id)
        AND (CAST(:status AS text) IS NULL OR coalesce(outcome, 'running') = :status)
        AND (CAST(:after AS text) IS NULL OR (accepted_at, id) {beyond} (
            SELECT accepted_at, id FROM generation_records WHERE tenant_id = :tenant_id AND id = :after
        ))
        ORDER BY accepted_at {direction}, id {direction} LIMIT :limit
    """)  # noqa: S608


_OLDEST_FIRST, _NEWEST_FIRST = _page(newest_first=False), _page(newest_first=True)


def _usage(groups: Sequence[str]) -> TextClause:
    """Sums, and what is not in them yet, as of one moment. The groups are part of the statement."""
    chosen = ", ".join(group if group in groups else f"NULL AS {group}" for group in _GROUPS)
    grouped = f"GROUP BY {', '.join(groups)} ORDER BY {', '.join(groups)}" if groups else "HAVING count(*) > 0"
    return text(f"""
        SELECT {chosen}, {_SUMS} FROM (
            SELECT tenant_id, day, credential_id, model_id, requests, errors, prompt_tokens, completion_tokens, cost, milliseconds
            FROM usage_by_day
            UNION ALL SELECT {_FIGURES} FROM generation_records WHERE ended_at IS NOT NULL AND NOT counted
        ) AS figures
        WHERE tenant_id = :tenant_id AND day >= :since AND day <= :until
        AND (CAST(:model AS text) IS NULL OR model_id = :model)
        AND (CAST(:credential_id AS text) IS NULL OR credential_id = :credential_id)
        {grouped} LIMIT :limit
    """)  # noqa: S608


class BatchRecords:
    """Implements `ports.RecordsBeingWritten` in the transaction of the events that are handled."""

    def __init__(self, transaction: BatchTransaction) -> None:
        self._connection = transaction.connection

    async def accept(self, records: Sequence[GenerationRecord], look_after: timedelta) -> None:
        """One statement for all."""
        await self._connection.execute(_ACCEPT, [_accepted(record, look_after) for record in records])

    async def end(self, records: Sequence[tuple[GenerationRecord, Ended]]) -> None:
        """One statement for all."""
        await self._connection.execute(_END, [{**_known(record), **vars(ended)} for record, ended in records])


class PostgresRecords:
    """Implements `ports.GenerationRecords`. Requests use the client role; only the loops see every tenant."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, tenant_id: str, generation_id: str) -> GenerationRecord | None:
        """One by its id."""
        async with self._database.reading(tenant_id) as connection:
            row = (await connection.execute(_FIND, {"tenant_id": tenant_id, "id": generation_id})).mappings().one_or_none()
        return None if row is None else _record(row)

    async def page(self, tenant_id: str, wanted: RecordPage) -> Sequence[GenerationRecord] | None:
        """By the time of the request, then by id; both reads see the same moment."""
        values = {"tenant_id": tenant_id, **vars(wanted)}
        async with self._database.reading(tenant_id) as connection:
            if wanted.after is not None:
                known = await connection.execute(_FIND, {"tenant_id": tenant_id, "id": wanted.after})
                if known.first() is None:
                    return None
            rows = await connection.execute(_NEWEST_FIRST if values.pop("newest_first") else _OLDEST_FIRST, values)
            return [_record(row) for row in rows.mappings()]

    async def usage(self, tenant_id: str, question: UsageQuestion) -> Sequence[UsageRow]:
        """One statement, so that nothing is counted twice or not at all while sums are being made."""
        values = {"tenant_id": tenant_id, **vars(question)}
        values.pop("groups")
        async with self._database.reading(tenant_id) as connection:
            rows = await connection.execute(_usage(question.groups), values)
            return [UsageRow(**row) for row in rows.mappings()]

    async def overdue(self, limit: int, again: timedelta) -> Sequence[GenerationRecord]:
        """Of any tenant; two replicas never get the same row."""
        async with self._database.transaction() as connection:
            rows = await connection.execute(_OVERDUE, {"limit": limit, "again": again})
            return [_record(row) for row in rows.mappings()]

    async def end(self, record: GenerationRecord, ended: Ended) -> None:
        """One insert."""
        async with self._database.transaction() as connection:
            await connection.execute(_END, {**_known(record), **vars(ended)})

    async def count(self, limit: int) -> int:
        """One statement; nothing while another replica counts."""
        async with self._database.transaction() as connection:
            return int(await connection.scalar(_COUNT, {"limit": limit}) or 0)

    async def expire(self, age: timedelta, limit: int) -> int:
        """One delete."""
        async with self._database.transaction() as connection:
            return (await connection.execute(_EXPIRE, {"age": age, "limit": limit})).rowcount


_KNOWN: Final = ("tenant_id", "id", "model_id", "asked_model", "provider", "capability", "credential_id", "user", "accepted_at")
_ENDED: Final = ("outcome", "finish_reason", "problem", "prompt_tokens", "completion_tokens", "usage_source", "cost")
_REQUEST: Final = ("deadline", "streamed", "include_usage", "include_obfuscation")


def _known(record: GenerationRecord) -> dict[str, Any]:
    """What both events tell."""
    return {name: getattr(record, name) for name in _KNOWN}


def _accepted(record: GenerationRecord, look_after: timedelta) -> dict[str, Any]:
    since = record.since
    due: datetime = (record.deadline or record.accepted_at) + look_after
    located = {"partition": since and since.partition, "offset": since and since.offset, "look_at": due}
    return {**_known(record), **{name: getattr(record, name) for name in _REQUEST}, **located}


def _record(row: RowMapping) -> GenerationRecord:
    values: dict[str, Any] = dict(row)
    partition, offset = values.pop("reply_partition"), values.pop("reply_offset")
    at = values.pop("ended_at")
    told = {name: values.pop(name) for name in _ENDED}
    values |= {name: bool(values[name]) for name in ("streamed", "include_usage", "include_obfuscation")}
    since = None if partition is None or offset is None else Since(partition, offset)
    values["user"] = values.pop("subject_id")
    return GenerationRecord(**values, since=since, ended=None if at is None else Ended(at=at, **told))
