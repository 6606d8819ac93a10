"""The tenant of an access token is looked up by whoever authenticates."""

from alembic import op

from tessera.storage import role_name

revision = "0007"
down_revision = "0006"

_FUNCTION = """
CREATE FUNCTION tenant_is_active(wanted text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = gateway, pg_temp AS $$
    SELECT EXISTS (SELECT 1 FROM tenants WHERE tenant_id = wanted AND state = 'active')
$$
"""


def upgrade() -> None:
    op.execute(_FUNCTION)
    op.execute("REVOKE EXECUTE ON FUNCTION tenant_is_active(text) FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION tenant_is_active(text) TO {role_name('gateway', 'authenticator')}")


def downgrade() -> None:
    op.execute("DROP FUNCTION tenant_is_active(text)")
