"""The audit trail: rows are added and read, and never changed."""

from alembic import op

from tessera.storage import role_name
from tessera.storage.migrations import protect

revision = "0004"
down_revision = "0003"

# tenant_id: the tenant acted upon; null where it is the platform, which no tenant's role ever sees.
_AUDIT_EVENTS = """
CREATE TABLE audit_events (
    tenant_id text,
    source text NOT NULL,
    event_id text NOT NULL,
    occurred_at timestamptz NOT NULL,
    action text NOT NULL,
    actor_id text,
    target_id text,
    record jsonb NOT NULL,
    UNIQUE NULLS NOT DISTINCT (tenant_id, source, event_id)
)
"""

_INDEXES = (
    "CREATE INDEX audit_events_of_tenant ON audit_events (tenant_id, occurred_at, event_id)",
    "CREATE INDEX audit_events_in_time ON audit_events (occurred_at, event_id)",
    "CREATE INDEX audit_events_of_actor ON audit_events (actor_id, occurred_at, event_id)",
    "CREATE INDEX audit_events_of_target ON audit_events (target_id, occurred_at, event_id)",
)

# Beside the privileges, because the owner and a superuser have them all. For each statement: no row has to be found, or seen, first.
_REFUSE = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'integrity_constraint_violation';
END
$$
"""
_TRIGGER = """
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
"""


def upgrade() -> None:
    op.execute(_AUDIT_EVENTS)
    for statement in _INDEXES:
        op.execute(statement)
    protect(op, "audit_events", client=("select",))
    op.execute(f"REVOKE UPDATE, DELETE, TRUNCATE ON audit_events FROM {role_name('retention', 'worker')}")
    op.execute(_REFUSE)
    op.execute(_TRIGGER)


def downgrade() -> None:
    op.execute("DROP TABLE audit_events")
    op.execute("DROP FUNCTION refuse_change()")
