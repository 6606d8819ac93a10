"""Keys have two secrets while they are exchanged, limits of their own, and are known to be used."""

from alembic import op

from tessera.storage import role_name

revision = "0005"
down_revision = "0004"

_COLUMNS = """
ALTER TABLE api_keys
    ADD COLUMN former_digest bytea CHECK (octet_length(former_digest) = 32),
    ADD COLUMN former_until timestamptz,
    ADD COLUMN last_used_at timestamptz,
    ADD COLUMN limits jsonb NOT NULL DEFAULT '{}',
    ADD CONSTRAINT api_keys_former CHECK ((former_digest IS NULL) = (former_until IS NULL))
"""

# A process of the version before goes on with the columns that it knows.
_FIND_KEY = """
CREATE FUNCTION find_key(wanted text)
RETURNS TABLE (
    tenant_id text, id text, digest bytea, scopes text[], expires_at timestamptz, revoked_at timestamptz,
    former_digest bytea, former_until timestamptz, limits jsonb
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = gateway, pg_temp AS $$
    SELECT k.tenant_id, k.id, k.digest, k.scopes, k.expires_at, k.revoked_at, k.former_digest, k.former_until, k.limits
    FROM api_keys k JOIN tenants t ON t.tenant_id = k.tenant_id
    WHERE k.id = wanted AND t.state = 'active'
$$
"""

_FIND_KEY_BEFORE = """
CREATE FUNCTION find_key(wanted text)
RETURNS TABLE (tenant_id text, id text, digest bytea, scopes text[], expires_at timestamptz, revoked_at timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = gateway, pg_temp AS $$
    SELECT k.tenant_id, k.id, k.digest, k.scopes, k.expires_at, k.revoked_at
    FROM api_keys k JOIN tenants t ON t.tenant_id = k.tenant_id
    WHERE k.id = wanted AND t.state = 'active'
$$
"""


def upgrade() -> None:
    op.execute(_COLUMNS)
    _replace(_FIND_KEY)


def downgrade() -> None:
    _replace(_FIND_KEY_BEFORE)
    op.execute(
        "ALTER TABLE api_keys DROP CONSTRAINT api_keys_former,"
        " DROP COLUMN former_digest, DROP COLUMN former_until, DROP COLUMN last_used_at, DROP COLUMN limits"
    )


def _replace(function: str) -> None:
    op.execute("DROP FUNCTION find_key(text)")
    op.execute(function)
    op.execute("REVOKE EXECUTE ON FUNCTION find_key(text) FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION find_key(text) TO {role_name('gateway', 'authenticator')}")
