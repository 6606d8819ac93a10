"""The projection of memory's metadata, policies and sweeps."""

from alembic import op

from tessera.storage.migrations import create_delivery_tables, drop_delivery_tables, protect

revision = "0001"
down_revision = None

# A change may arrive before the record itself: the two travel on different topics. Until it does, kind is null.
_MEMORIES = """
CREATE TABLE memories (
    tenant_id text NOT NULL,
    memory_id text NOT NULL,
    subject_id text,
    kind text,
    occurred_at timestamptz,
    recorded_at timestamptz,
    importance double precision,
    version integer NOT NULL CHECK (version >= 1),
    archived boolean NOT NULL DEFAULT false,
    PRIMARY KEY (tenant_id, memory_id),
    CHECK ((kind IS NULL) = (occurred_at IS NULL) AND (kind IS NULL) = (importance IS NULL))
)
"""

# Versions only grow; the newest is in force.
_POLICIES = """
CREATE TABLE policies (
    tenant_id text NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    policy jsonb NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, version)
)
"""

# due_at: when a worker may take the sweep; while one holds it, the end of its lease. fence: grows with every lease.
_SWEEPS = """
CREATE TABLE sweeps (
    tenant_id text NOT NULL,
    sweep_id text NOT NULL,
    dry_run boolean NOT NULL,
    plan_id text,
    state text NOT NULL CHECK (state IN ('running', 'planned', 'completed', 'failed')),
    policy_version integer NOT NULL,
    policy jsonb,
    as_of timestamptz NOT NULL,
    origin jsonb NOT NULL,
    cursor text NOT NULL DEFAULT '',
    planned_at timestamptz,
    chunks integer NOT NULL DEFAULT 0,
    requested_at timestamptz,
    due_at timestamptz NOT NULL DEFAULT now(),
    fence bigint NOT NULL DEFAULT 0,
    attempts integer NOT NULL DEFAULT 0,
    problem jsonb,
    created_at timestamptz NOT NULL,
    finished_at timestamptz,
    PRIMARY KEY (tenant_id, sweep_id)
)
"""

_SWEEP_ITEMS = """
CREATE TABLE sweep_items (
    tenant_id text NOT NULL,
    sweep_id text NOT NULL,
    memory_id text NOT NULL,
    version integer NOT NULL,
    kind text NOT NULL,
    occurred_at timestamptz NOT NULL,
    importance double precision NOT NULL,
    rule text NOT NULL,
    state text NOT NULL CHECK (state IN ('planned', 'requested', 'archived', 'skipped')),
    reason text,
    PRIMARY KEY (tenant_id, sweep_id, memory_id),
    FOREIGN KEY (tenant_id, sweep_id) REFERENCES sweeps (tenant_id, sweep_id) ON DELETE CASCADE
)
"""


def upgrade() -> None:
    create_delivery_tables(op)
    for statement in (_MEMORIES, _POLICIES, _SWEEPS, _SWEEP_ITEMS):
        op.execute(statement)
    op.execute("CREATE INDEX sweeps_due ON sweeps (due_at) WHERE state = 'running'")
    op.execute("CREATE INDEX sweep_items_open ON sweep_items (tenant_id, sweep_id, state) WHERE state IN ('planned', 'requested')")
    for table in ("memories", "policies", "sweeps", "sweep_items"):
        protect(op, table, client=("select",))


def downgrade() -> None:
    for table in ("sweep_items", "sweeps", "policies", "memories"):
        op.execute(f"DROP TABLE {table}")
    drop_delivery_tables(op)
