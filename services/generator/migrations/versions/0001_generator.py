"""Jobs and n-gram counts."""

from alembic import op

from tessera.storage.migrations import create_delivery_tables, drop_delivery_tables, protect

revision = "generator_0001"
down_revision = None
branch_labels = None
depends_on = None

# `ready` and `origin` are JSON as text: jsonb would refuse an escaped U+0000 in a message's parts, and nothing queries inside them.
_JOB = """
CREATE TABLE generation_job (
    tenant_id text NOT NULL,
    generation_id text NOT NULL,
    subject_id text,
    provider text,
    state text NOT NULL CHECK (state IN ('ready', 'running', 'completed', 'failed', 'cancelled')),
    ready text,
    origin text,
    deadline timestamptz,
    attempt bigint NOT NULL DEFAULT 0,
    lapses integer NOT NULL DEFAULT 0,
    run_after timestamptz NOT NULL DEFAULT now(),
    lease_expires_at timestamptz,
    cancel_reason text,
    last_index integer NOT NULL DEFAULT -1,
    last_offset integer NOT NULL DEFAULT 0,
    sent_text text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    PRIMARY KEY (tenant_id, generation_id),
    CHECK (finished_at IS NOT NULL OR (ready IS NOT NULL AND origin IS NOT NULL AND deadline IS NOT NULL AND provider IS NOT NULL)),
    CHECK ((state = 'running') = (lease_expires_at IS NOT NULL)),
    CHECK ((state IN ('ready', 'running')) = (finished_at IS NULL))
)
"""

# The rows of one context lie together, so that what followed it is one range of the primary key.
_NGRAM = """
CREATE TABLE ngram (
    tenant_id text NOT NULL,
    encoding text NOT NULL,
    context bytea NOT NULL,
    token integer NOT NULL,
    count bigint NOT NULL CHECK (count > 0),
    PRIMARY KEY (tenant_id, encoding, context, token)
)
"""

_NGRAM_OCCUPANCY = """
CREATE TABLE ngram_occupancy (
    tenant_id text NOT NULL,
    encoding text NOT NULL,
    ngram_order smallint NOT NULL,
    ones bigint NOT NULL,
    twos bigint NOT NULL,
    threes bigint NOT NULL,
    fours bigint NOT NULL,
    PRIMARY KEY (tenant_id, encoding, ngram_order)
)
"""

_NGRAM_LEARNED = """
CREATE TABLE ngram_learned (
    tenant_id text NOT NULL,
    encoding text NOT NULL,
    memory_id text NOT NULL,
    subject_id text,
    composition_id bytea NOT NULL CHECK (octet_length(composition_id) = 32),
    tokens integer NOT NULL,
    learned_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, encoding, memory_id)
)
"""

# Models that belong to no tenant are kept under the platform's.
_DECLARED_MODEL = """
CREATE TABLE declared_model (
    tenant_id text NOT NULL,
    model_id text NOT NULL,
    declaration text NOT NULL,
    PRIMARY KEY (tenant_id, model_id)
)
"""

_INDEXES = (
    "CREATE INDEX generation_job_ready ON generation_job (provider, created_at) WHERE state = 'ready'",
    "CREATE INDEX generation_job_running ON generation_job (lease_expires_at) WHERE state = 'running'",
    "CREATE INDEX generation_job_finished ON generation_job (finished_at) WHERE finished_at IS NOT NULL",
)


def upgrade() -> None:
    create_delivery_tables(op)
    for statement in (_JOB, _NGRAM, _NGRAM_OCCUPANCY, _NGRAM_LEARNED, _DECLARED_MODEL, *_INDEXES):
        op.execute(statement)
    protect(op, "generation_job")
    protect(op, "declared_model")
    for table in ("ngram", "ngram_occupancy", "ngram_learned"):
        protect(op, table, client=("select",))


def downgrade() -> None:
    for table in ("declared_model", "ngram_learned", "ngram_occupancy", "ngram", "generation_job"):
        op.execute(f"DROP TABLE {table}")
    drop_delivery_tables(op)
