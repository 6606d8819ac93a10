"""Memories with their indexes, entities and relations, tenants and refusals."""

from alembic import op

from tessera.storage.migrations import create_delivery_tables, drop_delivery_tables, protect

revision = "0001"
down_revision = None

_TABLES = (
    """
    CREATE TABLE tenant (
        tenant_id text PRIMARY KEY,
        state text NOT NULL CHECK (state IN ('active', 'suspended')),
        changed_at timestamptz NOT NULL
    )
    """,
    """
    CREATE TABLE memory (
        tenant_id text NOT NULL,
        id uuid NOT NULL,
        kind text NOT NULL CHECK (kind IN ('message', 'chunk', 'entity', 'relation')),
        version integer NOT NULL DEFAULT 1 CHECK (version >= 1),
        state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'archived')),
        subject_id text,
        origin_id text NOT NULL,
        origin_digest bytea NOT NULL CHECK (octet_length(origin_digest) = 16),
        occurred_at timestamptz NOT NULL,
        recorded_at timestamptz NOT NULL,
        importance real NOT NULL CHECK (importance BETWEEN 0 AND 1),
        text text,
        conversation_id text,
        role text,
        speaker text,
        document_id text,
        title text,
        chunk_index integer,
        chunk_count integer,
        start_offset integer,
        end_offset integer,
        entity_id text,
        series text,
        ordinal bigint NOT NULL DEFAULT 0,
        metadata jsonb NOT NULL DEFAULT '{}',
        archived_at timestamptz,
        archive_reason text,
        PRIMARY KEY (tenant_id, id)
    )
    """,
    # Neighbours are found in this order; it is total, so that every replica and every rebuild sees the same.
    "CREATE INDEX memory_series ON memory (tenant_id, series, occurred_at, ordinal, id) WHERE series IS NOT NULL",
    "CREATE INDEX memory_origin ON memory (tenant_id, origin_id)",
    "CREATE INDEX memory_entity ON memory (tenant_id, entity_id) WHERE entity_id IS NOT NULL",
    # Narrow, and never out of line: an exact scan reads nothing but vectors (halfvec beyond 2 kB would be TOASTed otherwise).
    """
    CREATE TABLE memory_vec (
        tenant_id text NOT NULL,
        model_id text NOT NULL,
        id uuid NOT NULL,
        alone halfvec(384) NOT NULL,
        context halfvec(384) NOT NULL,
        PRIMARY KEY (tenant_id, model_id, id),
        FOREIGN KEY (tenant_id, id) REFERENCES memory (tenant_id, id) ON DELETE CASCADE
    )
    """,
    "ALTER TABLE memory_vec ALTER COLUMN alone SET STORAGE PLAIN",
    "ALTER TABLE memory_vec ALTER COLUMN context SET STORAGE PLAIN",
    """
    CREATE TABLE memory_lex (
        tenant_id text NOT NULL,
        id uuid NOT NULL,
        alone sparsevec(536870912) NOT NULL,
        context sparsevec(536870912) NOT NULL,
        PRIMARY KEY (tenant_id, id),
        FOREIGN KEY (tenant_id, id) REFERENCES memory (tenant_id, id) ON DELETE CASCADE
    )
    """,
    """
    CREATE TABLE lexical_size (
        tenant_id text PRIMARY KEY,
        memories bigint NOT NULL
    )
    """,
    """
    CREATE TABLE lexical_term (
        tenant_id text NOT NULL,
        term integer NOT NULL,
        alone bigint NOT NULL DEFAULT 0,
        context bigint NOT NULL DEFAULT 0,
        PRIMARY KEY (tenant_id, term)
    ) WITH (fillfactor = 80)
    """,
    # No unique key on the memory: asking for the same work twice is harmless, and asking must never wait for a worker that has the row.
    """
    CREATE TABLE index_task (
        tenant_id text NOT NULL,
        id bigint GENERATED ALWAYS AS IDENTITY,
        memory_id uuid NOT NULL,
        stage text NOT NULL CHECK (stage IN ('lexical', 'vector')),
        neighbours boolean NOT NULL DEFAULT true,
        asked_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, id),
        FOREIGN KEY (tenant_id, memory_id) REFERENCES memory (tenant_id, id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX index_task_stage ON index_task (stage, id)",
    "CREATE INDEX index_task_memory ON index_task (tenant_id, memory_id)",
    """
    CREATE TABLE entity (
        tenant_id text NOT NULL,
        entity_id text NOT NULL,
        subject_id text,
        name text NOT NULL,
        kind text NOT NULL,
        aliases text[] NOT NULL DEFAULT '{}',
        description text,
        memory_id uuid NOT NULL,
        PRIMARY KEY (tenant_id, entity_id),
        FOREIGN KEY (tenant_id, memory_id) REFERENCES memory (tenant_id, id)
    )
    """,
    """
    CREATE TABLE entity_name (
        tenant_id text NOT NULL,
        name text NOT NULL,
        entity_id text NOT NULL,
        PRIMARY KEY (tenant_id, name, entity_id),
        FOREIGN KEY (tenant_id, entity_id) REFERENCES entity (tenant_id, entity_id) ON DELETE CASCADE
    )
    """,
    """
    CREATE TABLE mention (
        tenant_id text NOT NULL,
        memory_id uuid NOT NULL,
        entity_id text NOT NULL,
        PRIMARY KEY (tenant_id, memory_id, entity_id),
        FOREIGN KEY (tenant_id, memory_id) REFERENCES memory (tenant_id, id) ON DELETE CASCADE,
        FOREIGN KEY (tenant_id, entity_id) REFERENCES entity (tenant_id, entity_id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX mention_entity ON mention (tenant_id, entity_id, memory_id)",
    """
    CREATE TABLE relation (
        tenant_id text NOT NULL,
        source_entity_id text NOT NULL,
        relation text NOT NULL,
        target_entity_id text NOT NULL,
        memory_id uuid NOT NULL,
        subject_id text,
        weight real NOT NULL CHECK (weight BETWEEN 0 AND 1),
        valid_from timestamptz,
        valid_to timestamptz,
        PRIMARY KEY (tenant_id, source_entity_id, relation, target_entity_id, memory_id),
        FOREIGN KEY (tenant_id, memory_id) REFERENCES memory (tenant_id, id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX relation_target ON relation (tenant_id, target_entity_id, relation)",
    """
    CREATE TABLE refusal (
        tenant_id text NOT NULL,
        event_id text NOT NULL,
        source text NOT NULL,
        code text NOT NULL,
        message text NOT NULL,
        field text,
        refused_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, event_id, source)
    )
    """,
)

_READABLE = ("memory", "memory_vec", "memory_lex", "lexical_size", "lexical_term", "index_task", "entity", "mention", "relation", "refusal")
_HIDDEN = ("tenant", "entity_name")

_NOTIFY = """
CREATE FUNCTION notify_index_task() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tessera_memory_index', '');
    RETURN NULL;
END
$$
"""


def upgrade() -> None:
    create_delivery_tables(op)
    for statement in _TABLES:
        op.execute(statement)
    for table in _READABLE:
        protect(op, table, client=("select",))
    for table in _HIDDEN:
        protect(op, table)
    op.execute(_NOTIFY)
    op.execute("CREATE TRIGGER notify_index_task AFTER INSERT ON index_task FOR EACH STATEMENT EXECUTE FUNCTION notify_index_task()")


def downgrade() -> None:
    op.execute("DROP TABLE refusal, relation, mention, entity_name, entity, index_task, lexical_term, lexical_size")
    op.execute("DROP TABLE memory_lex, memory_vec, memory, tenant")
    op.execute("DROP FUNCTION notify_index_task()")
    drop_delivery_tables(op)
