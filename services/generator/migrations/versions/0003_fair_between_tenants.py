"""Whose turn it is: when each job was last claimed."""

from alembic import op

revision = "generator_0003"
down_revision = "generator_0002"


def upgrade() -> None:
    op.execute("ALTER TABLE generation_job ADD COLUMN claimed_at timestamptz")
    op.execute("CREATE INDEX generation_job_claimed ON generation_job (provider, tenant_id, claimed_at)")


def downgrade() -> None:
    op.execute("ALTER TABLE generation_job DROP COLUMN claimed_at")
