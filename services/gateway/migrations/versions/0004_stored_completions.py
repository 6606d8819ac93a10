"""Chats that their asker wants kept."""

from alembic import op

from tessera.storage.migrations import protect

revision = "0004"
down_revision = "0003"

# `request` and `answer` are JSON as text: jsonb would refuse an escaped U+0000 in what a provider said, and nothing queries inside them.
_STORED = """
CREATE TABLE stored_completions (
    tenant_id text NOT NULL REFERENCES tenants,
    id text NOT NULL,
    model text NOT NULL,
    metadata jsonb NOT NULL,
    request text NOT NULL,
    answer text,
    subject_id text,
    reply_partition integer NOT NULL,
    reply_offset bigint NOT NULL CHECK (reply_offset >= 0),
    created_at timestamptz NOT NULL,
    look_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, id)
)
"""

_INDEXES = (
    "CREATE INDEX stored_completions_listed ON stored_completions (tenant_id, created_at, id) WHERE answer IS NOT NULL",
    "CREATE INDEX stored_completions_subject ON stored_completions (tenant_id, subject_id) WHERE subject_id IS NOT NULL",
    "CREATE INDEX stored_completions_unended ON stored_completions (look_at) WHERE answer IS NULL",
    "CREATE INDEX stored_completions_age ON stored_completions (created_at)",
)


def upgrade() -> None:
    for statement in (_STORED, *_INDEXES):
        op.execute(statement)
    protect(op, "stored_completions", client=("select", "insert", "update", "delete"))


def downgrade() -> None:
    op.execute("DROP TABLE stored_completions")
