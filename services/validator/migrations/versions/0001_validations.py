"""Validations: leased job rows that become reports."""

from alembic import op

from tessera.storage.migrations import create_delivery_tables, drop_delivery_tables, protect

revision = "0001"
down_revision = None

# due_at: when a worker may take the job; while one holds it, the end of its lease. fence: grows with every lease.
_VALIDATIONS = """
CREATE TABLE validations (
    tenant_id text NOT NULL,
    validation_id text NOT NULL,
    candidate jsonb NOT NULL,
    reference jsonb,
    state text NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed')),
    origin jsonb NOT NULL,
    due_at timestamptz NOT NULL DEFAULT now(),
    fence bigint NOT NULL DEFAULT 0,
    attempts integer NOT NULL DEFAULT 0,
    report jsonb,
    problem jsonb,
    created_at timestamptz NOT NULL,
    finished_at timestamptz,
    PRIMARY KEY (tenant_id, validation_id)
)
"""


def upgrade() -> None:
    create_delivery_tables(op)
    op.execute(_VALIDATIONS)
    op.execute("CREATE INDEX validations_due ON validations (due_at) WHERE state IN ('queued', 'running')")
    protect(op, "validations", client=("select",))


def downgrade() -> None:
    op.execute("DROP TABLE validations")
    drop_delivery_tables(op)
