"""Tables of effect-once delivery, the same in every service. The bus owns their use; they are made here because migrations are.

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
