"""An index made without locking writers out, which has to leave the transaction."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("CREATE TABLE word (tenant_id text NOT NULL, text text NOT NULL, PRIMARY KEY (tenant_id, text))")
    with op.get_context().autocommit_block():
        op.execute("CREATE INDEX CONCURRENTLY word_text ON word (text)")


def downgrade() -> None:
    op.execute("DROP TABLE word")
