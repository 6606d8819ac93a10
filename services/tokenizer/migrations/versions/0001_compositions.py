"""Compositions per tenant, where they came from, and the tokens of the published encodings, which all tenants share."""

from alembic import op
from sqlalchemy import text

from tessera.encodings import ENCODING_NAMES, encoding
from tessera.storage.migrations import create_delivery_tables, drop_delivery_tables, protect, service_of
from tessera.storage.settings import role_name
from tessera.tokenizer.domain.composition import token_id

revision = "0001"
down_revision = None

_SEED_ROWS = 50_000

_TABLES = (
    # The one table without a tenant: published data, the same for everybody, read-only to every role that a service uses.
    """
    CREATE TABLE token (
        id bytea NOT NULL CHECK (octet_length(id) = 32),
        bytes bytea NOT NULL
    )
    """,
    """
    CREATE TABLE composition (
        tenant_id text NOT NULL,
        id bytea NOT NULL CHECK (octet_length(id) = 32),
        child_count integer NOT NULL CHECK (child_count >= 0),
        byte_count integer NOT NULL CHECK (byte_count >= 0),
        created_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, id)
    )
    """,
    # A child is a composition of the same tenant or a token. No foreign key says which: the id itself proves the content when it is read.
    """
    CREATE TABLE composition_child (
        tenant_id text NOT NULL,
        composition_id bytea NOT NULL,
        ordinal integer NOT NULL CHECK (ordinal >= 0),
        child_id bytea NOT NULL CHECK (octet_length(child_id) = 32),
        PRIMARY KEY (tenant_id, composition_id, ordinal),
        FOREIGN KEY (tenant_id, composition_id) REFERENCES composition (tenant_id, id) ON DELETE CASCADE
    )
    """,
    # Compositions are shared by all texts of a tenant; whose they are is said here, for the day a subject is to be forgotten.
    """
    CREATE TABLE composition_source (
        tenant_id text NOT NULL,
        composition_id bytea NOT NULL,
        kind text NOT NULL CHECK (kind IN ('memory', 'request')),
        source_id text NOT NULL,
        subject_id text,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, composition_id, kind, source_id)
    )
    """,
    "CREATE INDEX composition_source_subject ON composition_source (tenant_id, subject_id) WHERE subject_id IS NOT NULL",
)


def upgrade():
    for statement in _TABLES:
        op.execute(statement)
    for table in ("composition", "composition_child", "composition_source"):
        protect(op, table, client=("select", "insert"))
    create_delivery_tables(op)
    _seed_tokens()
    _protect_tokens()


def downgrade():
    drop_delivery_tables(op)
    for table in ("composition_source", "composition_child", "composition", "token"):
        op.execute(f"DROP TABLE {table}")


def _seed_tokens():
    """Every single token of the verified ranks; the index comes after the rows, which is several times faster."""
    tokens = sorted({token for name in ENCODING_NAMES for _, token in encoding(name).ordinary_tokens()})
    insert = text("INSERT INTO token (id, bytes) SELECT * FROM unnest(CAST(:ids AS bytea[]), CAST(:tokens AS bytea[]))")
    for start in range(0, len(tokens), _SEED_ROWS):
        rows = tokens[start : start + _SEED_ROWS]
        op.get_bind().execute(insert, {"ids": [token_id(token) for token in rows], "tokens": rows})
    # A second token under the same id would fail here.
    op.execute("ALTER TABLE token ADD PRIMARY KEY (id)")


def _protect_tokens():
    readers = ", ".join(role_name(service_of(op), role) for role in ("worker", "client"))
    op.execute("ALTER TABLE token ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE token FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY read_by_all ON token FOR SELECT TO {readers} USING (true)")
    op.execute(f"GRANT SELECT ON token TO {readers}")
