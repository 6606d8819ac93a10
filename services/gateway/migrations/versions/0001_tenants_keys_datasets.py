"""Tenants, API keys with their one look-up function, datasets, generations with an Idempotency-Key, delivery tables."""

from alembic import op

from tessera.storage import role_name
from tessera.storage.migrations import create_delivery_tables, drop_delivery_tables, protect

revision = "0001"
down_revision = None

_TENANTS = """
CREATE TABLE tenants (
    tenant_id text PRIMARY KEY,
    name text NOT NULL,
    state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended')),
    created_at timestamptz NOT NULL
)
"""

_API_KEYS = """
CREATE TABLE api_keys (
    tenant_id text NOT NULL REFERENCES tenants,
    id text NOT NULL UNIQUE,
    name text NOT NULL,
    environment text NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    scopes text[] NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    PRIMARY KEY (tenant_id, id)
)
"""

_DATASETS = """
CREATE TABLE datasets (
    tenant_id text NOT NULL REFERENCES tenants,
    id text NOT NULL,
    object_key text NOT NULL,
    format text NOT NULL CHECK (format IN ('csv', 'parquet', 'jsonl')),
    size_bytes bigint NOT NULL CHECK (size_bytes > 0),
    sha256 text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
)
"""

# One row per generation with an Idempotency-Key, written before its event is published.
_GENERATIONS = """
CREATE TABLE generations (
    tenant_id text NOT NULL REFERENCES tenants,
    id text NOT NULL,
    body_digest bytea NOT NULL CHECK (octet_length(body_digest) = 16),
    reply_partition integer NOT NULL,
    reply_offset bigint NOT NULL CHECK (reply_offset >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
)
"""

# The only thing that the authenticator may do: one key by its public id, of an active tenant.
_FIND_KEY = """
CREATE FUNCTION find_key(wanted text)
RETURNS TABLE (tenant_id text, id text, digest bytea, scopes text[], expires_at timestamptz, revoked_at timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = gateway, pg_temp AS $$
    SELECT k.tenant_id, k.id, k.digest, k.scopes, k.expires_at, k.revoked_at
    FROM api_keys k JOIN tenants t ON t.tenant_id = k.tenant_id
    WHERE k.id = wanted AND t.state = 'active'
$$
"""


def upgrade() -> None:
    for statement in (_TENANTS, _API_KEYS, _DATASETS, _GENERATIONS):
        op.execute(statement)
    protect(op, "tenants", client=("select",), owner=True)
    protect(op, "api_keys", owner=True)
    protect(op, "datasets", client=("select", "insert"), owner=True)
    protect(op, "generations", client=("select", "insert"))
    op.execute(_FIND_KEY)
    op.execute("REVOKE EXECUTE ON FUNCTION find_key(text) FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION find_key(text) TO {role_name('gateway', 'authenticator')}")
    create_delivery_tables(op)


def downgrade() -> None:
    drop_delivery_tables(op)
    op.execute("DROP FUNCTION find_key(text)")
    for table in ("generations", "datasets", "api_keys", "tenants"):
        op.execute(f"DROP TABLE {table}")
