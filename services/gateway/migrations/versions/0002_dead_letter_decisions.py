"""What operators decided about dead letters."""

from alembic import op

from tessera.storage.migrations import protect

revision = "0002"
down_revision = "0001"

# Of no tenant: whose a refused event is may be unknown. The digest names the original, not the letter's place in the log.
_DECISIONS = """
CREATE TABLE dead_letter_decisions (
    topic text NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 16),
    outcome text NOT NULL CHECK (outcome IN ('replayed', 'discarded')),
    decided_at timestamptz NOT NULL DEFAULT now(),
    decided_by text NOT NULL,
    PRIMARY KEY (topic, digest)
)
"""


def upgrade() -> None:
    op.execute(_DECISIONS)
    protect(op, "dead_letter_decisions")


def downgrade() -> None:
    op.execute("DROP TABLE dead_letter_decisions")
