"""Delivery tables, a partitioned table that clients may read and add to, and one that they may not touch."""

from alembic import op

from tessera.storage import role_name
from tessera.storage.migrations import create_delivery_tables, drop_delivery_tables, protect

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_delivery_tables(op)
    op.execute(
        "CREATE TABLE note (tenant_id text NOT NULL, subject_id text, id bigint NOT NULL, body text NOT NULL, PRIMARY KEY (tenant_id, id))"
        " PARTITION BY HASH (tenant_id)"
    )
    op.execute("CREATE TABLE note_0 PARTITION OF note FOR VALUES WITH (MODULUS 2, REMAINDER 0)")
    op.execute("CREATE TABLE note_1 PARTITION OF note FOR VALUES WITH (MODULUS 2, REMAINDER 1)")
    protect(op, "note", client=("select", "insert"))
    op.execute("CREATE TABLE credential (tenant_id text NOT NULL, digest bytea NOT NULL, PRIMARY KEY (tenant_id, digest))")
    protect(op, "credential", owner=True)
    op.execute(
        "CREATE FUNCTION tenant_of(sought bytea) RETURNS text LANGUAGE sql SECURITY DEFINER SET search_path = sample"
        " AS 'SELECT tenant_id FROM credential WHERE digest = sought'"
    )
    op.execute(f"GRANT EXECUTE ON FUNCTION tenant_of(bytea) TO {role_name('sample', 'authenticator')}")


def downgrade() -> None:
    op.execute("DROP FUNCTION tenant_of(bytea)")
    op.execute("DROP TABLE credential, note")
    drop_delivery_tables(op)
