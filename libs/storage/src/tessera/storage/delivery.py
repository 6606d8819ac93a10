"""Tables of effect-once delivery, the same in every service. The bus owns their use; they are made here because migrations are.

`statements` is what services' first revisions made and never changes; `parked_statements` is what a later revision puts in the place of
the first `parked`, which nothing ever wrote to.

The channel `tessera_outbox_<service>` is notified once per statement that inserts into `outbox`.
"""

from collections.abc import Sequence

TABLES: tuple[str, ...] = ("inbox", "outbox", "consumer_position", "batch_mark", "parked", "relay_lease")


def outbox_channel(service: str) -> str:
    """The channel on which a relay of the service listens."""
    return f"tessera_outbox_{service}"


def statements() -> Sequence[str]:
    """The DDL, in order."""
    return (_INBOX, _OUTBOX, _CONSUMER_POSITION, _BATCH_MARK, _PARKED, _RELAY_LEASE, _NOTIFY, _NOTIFY_TRIGGER)


# An event's identity and body digest (16 bytes each) per consumer and generation of its projection.
_INBOX = """
CREATE TABLE inbox (
    tenant_id text NOT NULL,
    consumer text NOT NULL,
    generation integer NOT NULL DEFAULT 1,
    identity bytea NOT NULL CHECK (octet_length(identity) = 16),
    body bytea NOT NULL CHECK (octet_length(body) = 16),
    received_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, consumer, generation, identity)
)
"""

_OUTBOX = """
CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id uuid NOT NULL,
    topic text NOT NULL,
    partition integer,
    key bytea,
    headers jsonb NOT NULL,
    value bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
)
"""

_CONSUMER_POSITION = """
CREATE TABLE consumer_position (
    consumer text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    next_offset bigint NOT NULL CHECK (next_offset >= 0),
    PRIMARY KEY (consumer, topic, partition)
)
"""

_BATCH_MARK = """
CREATE TABLE batch_mark (
    consumer text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    first_offset bigint NOT NULL,
    last_offset bigint NOT NULL CHECK (last_offset >= first_offset),
    attempts integer NOT NULL DEFAULT 1,
    marked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, topic, partition)
)
"""

_PARKED = """
CREATE TABLE parked (
    tenant_id text NOT NULL,
    consumer text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    key bytea,
    state text NOT NULL,
    reason text NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    parked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, consumer, topic, partition, "offset")
)
"""

# Events that came and were not applied (docs/retries.md). `waiting` and `stuck` hold the record itself, which is to be handled from here;
# `delayed` ones are in a retry topic, `refused` and `dead` ones in the dead letters. Without a tenant where none can be believed.
_NOT_APPLIED = """
CREATE TABLE parked (
    consumer text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    tenant_id text,
    identity bytea CHECK (octet_length(identity) = 16),
    key bytea,
    state text NOT NULL CHECK (state IN ('waiting', 'stuck', 'delayed', 'refused', 'dead')),
    attempts integer NOT NULL DEFAULT 0,
    failures integer NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    code text NOT NULL CHECK (length(code) <= 64),
    message text NOT NULL CHECK (length(message) <= 500),
    traceparent text,
    record_milliseconds bigint,
    headers jsonb,
    value bytea,
    parked_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, topic, partition, "offset"),
    CHECK ((state IN ('waiting', 'stuck')) = (value IS NOT NULL AND headers IS NOT NULL AND record_milliseconds IS NOT NULL))
)
"""

_SHOWN_TO_TENANT = 'consumer, topic, partition, "offset", tenant_id, identity, key, state, attempts, due_at, code, message, parked_at'


def parked_statements(client: str) -> Sequence[str]:
    """The DDL that replaces the first `parked`, in order; `client` is the role that reads its tenant's rows, without their content."""
    mine = "tenant_id = NULLIF(current_setting('app.tenant', true), '')"
    return (
        "DROP TABLE parked",
        _NOT_APPLIED,
        "CREATE INDEX parked_identity ON parked (tenant_id, identity)",
        "CREATE INDEX parked_ended ON parked (changed_at) WHERE state IN ('refused', 'dead')",
        f"CREATE POLICY client_own_tenant ON parked FOR SELECT TO {client} USING ({mine})",
        f"GRANT SELECT ({_SHOWN_TO_TENANT}) ON parked TO {client}",
    )


def first_parked_statements() -> Sequence[str]:
    """The DDL that puts the first `parked` back."""
    return ("DROP TABLE parked", _PARKED)


_RELAY_LEASE = """
CREATE TABLE relay_lease (
    name text PRIMARY KEY,
    holder text NOT NULL,
    epoch bigint NOT NULL,
    expires_at timestamptz NOT NULL
)
"""

_NOTIFY = """
CREATE FUNCTION notify_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tessera_outbox_' || TG_TABLE_SCHEMA, '');
    RETURN NULL;
END
$$
"""

_NOTIFY_TRIGGER = "CREATE TRIGGER notify_outbox AFTER INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION notify_outbox()"
