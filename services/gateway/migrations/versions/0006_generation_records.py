"""What became of generations, what was used by day, answers that can be asked for again; keys say what a client's leaving means."""

from alembic import op

from tessera.storage import role_name
from tessera.storage.migrations import protect

revision = "0006"
down_revision = "0005"

# A projection of `generation.requested` and `generation.ended`, which may come in either order: what a row does not know yet is null.
_RECORDS = """
CREATE TABLE generation_records (
    tenant_id text NOT NULL,
    id text NOT NULL,
    model_id text NOT NULL,
    asked_model text NOT NULL,
    provider text NOT NULL,
    capability text NOT NULL,
    credential_id text,
    subject_id text,
    accepted_at timestamptz,
    deadline timestamptz,
    streamed boolean,
    include_usage boolean,
    include_obfuscation boolean,
    reply_partition integer,
    reply_offset bigint,
    look_at timestamptz,
    outcome text CHECK (outcome IN ('completed', 'failed', 'cancelled')),
    finish_reason text,
    problem text,
    prompt_tokens bigint,
    completion_tokens bigint,
    usage_source text,
    cost numeric,
    ended_at timestamptz,
    counted boolean NOT NULL DEFAULT false,
    PRIMARY KEY (tenant_id, id),
    CHECK ((outcome IS NULL) = (ended_at IS NULL))
)
"""

_USAGE = """
CREATE TABLE usage_by_day (
    tenant_id text NOT NULL,
    day date NOT NULL,
    credential_id text NOT NULL,
    model_id text NOT NULL,
    requests bigint NOT NULL,
    errors bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cost numeric NOT NULL,
    milliseconds bigint NOT NULL,
    PRIMARY KEY (tenant_id, day, credential_id, model_id)
)
"""

# Of requests with an Idempotency-Key, except those whose ids say what was done. Without an answer: it is being worked on.
_ANSWERS = """
CREATE TABLE idempotent_answers (
    tenant_id text NOT NULL REFERENCES tenants,
    operation text NOT NULL,
    key text NOT NULL,
    body_digest bytea NOT NULL CHECK (octet_length(body_digest) = 16),
    leased_until timestamptz NOT NULL,
    status integer,
    answer text,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, operation, key),
    CHECK ((status IS NULL) = (answer IS NULL))
)
"""

_INDEXES = (
    "CREATE INDEX idempotent_answers_age ON idempotent_answers (created_at)",
    "CREATE INDEX generation_records_listed ON generation_records (tenant_id, accepted_at, id) WHERE accepted_at IS NOT NULL",
    "CREATE INDEX generation_records_subject ON generation_records (tenant_id, subject_id) WHERE subject_id IS NOT NULL",
    "CREATE INDEX generation_records_unended ON generation_records (look_at) WHERE ended_at IS NULL",
    "CREATE INDEX generation_records_uncounted ON generation_records (ended_at) WHERE ended_at IS NOT NULL AND NOT counted",
    "CREATE INDEX generation_records_age ON generation_records (ended_at) WHERE counted",
)

# A process of the version before goes on with the columns that it knows.
_FIND_KEY = """
CREATE FUNCTION find_key(wanted text)
RETURNS TABLE (
    tenant_id text, id text, digest bytea, scopes text[], expires_at timestamptz, revoked_at timestamptz,
    former_digest bytea, former_until timestamptz, limits jsonb, on_disconnect text
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = gateway, pg_temp AS $$
    SELECT k.tenant_id, k.id, k.digest, k.scopes, k.expires_at, k.revoked_at, k.former_digest, k.former_until, k.limits, k.on_disconnect
    FROM api_keys k JOIN tenants t ON t.tenant_id = k.tenant_id
    WHERE k.id = wanted AND t.state = 'active'
$$
"""

_FIND_KEY_BEFORE = """
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


def upgrade() -> None:
    for statement in (_RECORDS, _USAGE, _ANSWERS, *_INDEXES):
        op.execute(statement)
    protect(op, "generation_records", client=("select",))
    protect(op, "usage_by_day", client=("select",))
    protect(op, "idempotent_answers", client=("select", "insert", "update", "delete"))
    op.execute("ALTER TABLE api_keys ADD COLUMN on_disconnect text CHECK (on_disconnect IN ('cancel', 'finish'))")
    _replace(_FIND_KEY)


def downgrade() -> None:
    _replace(_FIND_KEY_BEFORE)
    op.execute("ALTER TABLE api_keys DROP COLUMN on_disconnect")
    for table in ("idempotent_answers", "usage_by_day", "generation_records"):
        op.execute(f"DROP TABLE {table}")


def _replace(function: str) -> None:
    op.execute("DROP FUNCTION find_key(text)")
    op.execute(function)
    op.execute("REVOKE EXECUTE ON FUNCTION find_key(text) FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION find_key(text) TO {role_name('gateway', 'authenticator')}")
