"""Every Prometheus metric of Tessera, with its meaning. Nothing else may define one.

No label may hold a tenant, a user or a text: labels are few and known (models are those on offer). Times are in seconds, sizes in bytes.
"""

from prometheus_client import Counter, Gauge, Histogram

# --- every service
SERVICE_INFO = Gauge("tessera_service_info", "Always 1; names the service and the replica that answers.", ["service", "instance"])
DEPENDENCY_UP = Gauge("tessera_dependency_up", "1 when the last health check of the dependency passed, else 0.", ["dependency"])
BREAKER_OPEN = Gauge("tessera_breaker_open", "0 closed, 0.5 half open, 1 open: the breaker in front of the dependency.", ["dependency"])
SETTINGS_RELOADS = Counter("tessera_settings_reloads_total", "Settings read again while running: taken or refused.", ["outcome"])

# --- bus: events, consumers, outbox ------------------------------------------------------------------------------------------------------
BUS_PUBLISHED = Counter(
    "tessera_bus_published_events_total", "Events handed to Kafka; a tenant's own topics count as their shared one.", ["topic"]
)
BUS_CONSUMED = Counter(
    "tessera_bus_consumed_events_total", "Events handled to their end: applied, answered, refused or recognised.", ["consumer", "topic"]
)
BUS_REDELIVERED = Counter(
    "tessera_bus_redelivered_events_total", "Events of a batch that died before its commit, handled again.", ["consumer"]
)
BUS_DUPLICATES = Counter(
    "tessera_bus_duplicate_events_total", "Events that the inbox knew already and that had no second effect.", ["consumer"]
)
BUS_REFUSED = Counter(
    "tessera_bus_refused_events_total", "Events that can never be handled, by machine-readable reason.", ["consumer", "code"]
)
BUS_RETRIES = Counter("tessera_bus_retries_total", "Attempts that failed for a passing reason and are repeated.", ["consumer"])
BUS_PARKED = Gauge("tessera_bus_parked_events", "Events of this replica's partitions that wait here, by state.", ["consumer", "state"])
BUS_HALTED = Gauge("tessera_bus_halted", "1 while the consumer is halted because too much went to the dead letters.", ["consumer"])
BUS_DELAYED = Counter("tessera_bus_delayed_events_total", "Events put into a retry topic.", ["consumer"])
BUS_FENCED = Counter(
    "tessera_bus_fenced_batches_total", "Batches rolled back because another replica had moved the position.", ["consumer"]
)
BUS_REJOINS = Counter("tessera_bus_rejoins_total", "Times a consumer that was alive but stuck joined its group anew.", ["consumer"])
BUS_LAG = Gauge("tessera_bus_lag_events", "Events on the partition that are not handled yet.", ["consumer", "topic", "partition"])
BUS_RELAYED = Counter("tessera_bus_relayed_events_total", "Rows of the outbox published and deleted.")
BUS_PRODUCERS_REPLACED = Counter("tessera_bus_producers_replaced_total", "Producers that ended because a record was not acknowledged.")
BUS_STREAM_OVERFLOWS = Counter(
    "tessera_bus_stream_overflows_total", "Replies dropped because their reader was too slow; it can resume from the log."
)

# --- memory: admission, indexing, recall -------------------------------------------------------------------------------------------------
MEMORIES_RECORDED = Counter("tessera_memories_recorded_total", "Memories admitted and put on the log of record.", ["kind"])
MEMORIES_INDEXED = Counter("tessera_memories_indexed_total", "Index tasks done, by stage (lexical, vector).", ["stage"])
RECALLS = Counter("tessera_recalls_total", "Searches of memory; degraded ones were answered without the embedder.", ["state"])
READERS_WAITING = Gauge("tessera_readers_waiting", "Reads that wait for the projection to become fresh enough.")
FRESH_READS = Counter("tessera_fresh_reads_total", "Looks that ended a read with a demand on freshness, by what it was told.", ["standing"])
RECALL_SECONDS = Histogram(
    "tessera_recall_seconds",
    "From the question to the ranked memories, embedding included.",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)

# --- generator: jobs and providers -------------------------------------------------------------------------------------------------------
GENERATIONS_RUNNING = Gauge("tessera_generations_running", "Generations that this replica runs now.", ["provider"])
GENERATIONS_ENDED = Counter(
    "tessera_generations_ended_total",
    "Attempts that ended; `completed`, or the code of the problem or of the giving back.",
    ["provider", "outcome"],
)
GENERATION_SECONDS = Histogram(
    "tessera_generation_duration_seconds",
    "From the lease of a job to its end in this attempt.",
    ["provider"],
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300),
)
GENERATION_FIRST_CHUNK_SECONDS = Histogram(
    "tessera_generation_first_chunk_seconds",
    "From the lease of a job to the acknowledgement of its first chunk.",
    ["provider"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

# --- OpenTelemetry's semantic conventions for generative AI, names as Prometheus has them, boundaries as they advise -----
_GEN_AI = ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"]
_GEN_AI_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_GEN_AI_FIRST_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
GEN_AI_CLIENT_SECONDS = Histogram(
    "gen_ai_client_operation_duration_seconds",
    "The generator: one attempt at an engine or provider, whole.",
    [*_GEN_AI, "error_type"],
    buckets=_GEN_AI_SECONDS,
)
GEN_AI_CLIENT_TOKENS = Histogram(
    "gen_ai_client_token_usage",
    "The generator: tokens of one generation, `input` or `output`.",
    [*_GEN_AI, "gen_ai_token_type"],
    buckets=(1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304),
)
GEN_AI_SERVER_SECONDS = Histogram(
    "gen_ai_server_request_duration_seconds",
    "The gateway: from publishing a generation to its end.",
    [*_GEN_AI, "error_type"],
    buckets=_GEN_AI_SECONDS,
)
GEN_AI_SERVER_FIRST_SECONDS = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "The gateway: from publishing a generation to the first piece of its answer.",
    _GEN_AI,
    buckets=_GEN_AI_FIRST_SECONDS,
)

# --- gateway: the spool (docs/hand-off.md) -----------------------------------------------------------------------------------------------
SPOOL_RECORDS = Gauge("tessera_spool_records", "Accepted events on this replica's disk that Kafka does not have yet.")
SPOOL_BYTES = Gauge("tessera_spool_bytes", "Size of the segments that this replica holds.")
SPOOL_OLDEST_SECONDS = Gauge("tessera_spool_oldest_seconds", "Age of the oldest event in the spool; 0 when it is empty.")
SPOOL_KEPT = Counter("tessera_spool_kept_total", "Events written to the spool.")
SPOOL_SENT = Counter(
    "tessera_spool_sent_total",
    "Events that left the spool: published, expired (published with a deadline that has passed), damaged (set aside).",
    ["outcome"],
)
SPOOL_REFUSED = Counter("tessera_spool_refused_total", "Events that the spool did not take: full, or its disk failed.", ["reason"])
SPOOL_DAMAGED = Counter("tessera_spool_damaged_total", "Parts of segments that could not be read again.")
