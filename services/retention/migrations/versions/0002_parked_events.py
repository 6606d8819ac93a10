"""Events that came and were not applied."""

from alembic import op

from tessera.storage.migrations import add_parked_events, remove_parked_events

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    add_parked_events(op)


def downgrade() -> None:
    remove_parked_events(op)
