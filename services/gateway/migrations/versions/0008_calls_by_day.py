"""How many calls there were, by day, key and operation."""

from alembic import op

from tessera.storage.migrations import protect

revision = "0008"
down_revision = "0007"

_CALLS = """
CREATE TABLE calls_by_day (
    tenant_id text NOT NULL,
    day date NOT NULL,
    credential_id text NOT NULL,
    operation text NOT NULL,
    requests bigint NOT NULL,
    errors bigint NOT NULL,
    PRIMARY KEY (tenant_id, day, credential_id, operation)
)
"""

# What has been added already: a replica that does not know whether its counts were committed sends them again.
_ADDED = """
CREATE TABLE calls_added (
    tenant_id text NOT NULL,
    id uuid NOT NULL,
    added_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
)
"""


def upgrade() -> None:
    for statement in (_CALLS, _ADDED, "CREATE INDEX calls_added_age ON calls_added (added_at)"):
        op.execute(statement)
    protect(op, "calls_by_day", client=("select",))
    protect(op, "calls_added")


def downgrade() -> None:
    for table in ("calls_added", "calls_by_day"):
        op.execute(f"DROP TABLE {table}")
