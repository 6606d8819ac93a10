"""Whose turn it is: when each sweep was last claimed."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE sweeps ADD COLUMN claimed_at timestamptz")
    op.execute("CREATE INDEX sweeps_claimed ON sweeps (tenant_id, claimed_at)")


def downgrade() -> None:
    op.execute("ALTER TABLE sweeps DROP COLUMN claimed_at")
