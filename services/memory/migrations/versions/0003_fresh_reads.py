"""What fresh reads look at, in the snapshot of the answer itself, and what wakes those that wait."""

from alembic import op

from tessera.storage.migrations import hide_progress_from_client, show_progress_to_client

revision = "0003"
down_revision = "0002"

_NOTIFY = """
CREATE FUNCTION notify_progress() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tessera_memory_progress', '');
    RETURN NULL;
END
$$
"""
# Ingestion moved on; something can be found that could not.
_MOMENTS = {"consumer_position": "UPDATE", "index_task": "DELETE"}


def upgrade() -> None:
    show_progress_to_client(op)
    op.execute("CREATE INDEX memory_origin_digest ON memory (tenant_id, origin_digest)")
    op.execute("CREATE INDEX index_task_tenant ON index_task (tenant_id, stage, id) WHERE neighbours")
    op.execute(_NOTIFY)
    for table, moment in _MOMENTS.items():
        op.execute(f"CREATE TRIGGER notify_progress AFTER {moment} ON {table} FOR EACH STATEMENT EXECUTE FUNCTION notify_progress()")


def downgrade() -> None:
    for table in _MOMENTS:
        op.execute(f"DROP TRIGGER notify_progress ON {table}")
    op.execute("DROP FUNCTION notify_progress()")
    op.execute("DROP INDEX index_task_tenant")
    op.execute("DROP INDEX memory_origin_digest")
    hide_progress_from_client(op)
