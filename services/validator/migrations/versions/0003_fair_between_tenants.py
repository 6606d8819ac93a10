"""Whose turn it is: when each validation was last claimed."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE validations ADD COLUMN claimed_at timestamptz")
    op.execute("CREATE INDEX validations_claimed ON validations (tenant_id, claimed_at)")


def downgrade() -> None:
    op.execute("ALTER TABLE validations DROP COLUMN claimed_at")
