"""Builds the gateway: the only place that knows every part."""

import asyncio
from datetime import timedelta

from tessera.bus.reloading import Prepare, Swap
from tessera.bus.service import Runtime, run_service
from tessera.bus.tables import Table
from tessera.contracts.errors import FatalError, RetryableError
from tessera.gateway import consumers, workers
from tessera.gateway.adapters.access_tokens import JwtAccessTokens
from tessera.gateway.adapters.active_tenants import PostgresActiveTenants
from tessera.gateway.adapters.answers import PostgresAnswers
from tessera.gateway.adapters.audit import OutboxAuditTrail
from tessera.gateway.adapters.call_sums import PostgresCallSums
from tessera.gateway.adapters.counters import RedisCounters
from tessera.gateway.adapters.dead_letters import LoggedDeadLetters, PostgresDecisions
from tessera.gateway.adapters.generation_records import BatchRecords, PostgresRecords
from tessera.gateway.adapters.issuer import Freshness, Issuer, IssuerKeys, issuer_client
from tessera.gateway.adapters.log import BusLog
from tessera.gateway.adapters.objects import StoredDatasets
from tessera.gateway.adapters.postgres import PostgresGenerations, PostgresKeys, PostgresTenants
from tessera.gateway.adapters.spool import DiskSpool, SpoolLimits
from tessera.gateway.adapters.stored import PostgresStoredCompletions
from tessera.gateway.domain import keys
from tessera.gateway.domain.consistency import Tokens
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.records import Price, Prices
from tessera.gateway.handlers import stored
from tessera.gateway.handlers.access import Authenticator, LastUses, bootstrap
from tessera.gateway.handlers.auditing import Refusals
from tessera.gateway.handlers.calls import Calls
from tessera.gateway.handlers.generations import Limits
from tessera.gateway.handlers.handoff import Handoff
from tessera.gateway.handlers.limiting import Gate
from tessera.gateway.handlers.records import Bookkeeper
from tessera.gateway.handlers.repeats import Forgetting
from tessera.gateway.handlers.tokens import TokenAuthenticator
from tessera.gateway.handlers.unauthenticated import Unauthenticated, make_tenant
from tessera.gateway.ports import Tenants
from tessera.gateway.routes.application import application
from tessera.gateway.routes.context import Rooms
from tessera.gateway.routes.cors import Cors
from tessera.gateway.routes.edge import EdgeLimits
from tessera.gateway.routes.protocol import UnswitchingProtocol
from tessera.gateway.settings import GatewaySettings
from tessera.resilience import Breaker, RetryPolicy, retrying
from tessera.storage import ObjectStore, redis_client
from tessera.telemetry import get_logger

_log = get_logger(__name__)
_PATIENT = RetryPolicy(attempts=None, maximum=timedelta(seconds=2))


def main() -> None:
    """Runs the gateway until SIGTERM."""
    run_service(GatewaySettings, build)


async def build(runtime: Runtime[GatewaySettings]) -> None:
    """Puts the parts together."""
    settings = runtime.settings
    store = ObjectStore(settings.objects)
    rooms = await _rooms(runtime, store)
    rooms.models.names = settings.model_names
    tables = consumers.register(runtime.bus, rooms.models, rooms.statuses)
    runtime.add_dependency("objects", required=False, check=store.check, breaker=store.breaker)
    for name, table in tables.items():
        _add_table(runtime, rooms.handoff, name, table)
    if settings.spool.folder is not None:
        _drain_spool(runtime, rooms.handoff)
    repair = stored.Repair(rooms.stored, rooms.log, timedelta(days=settings.stored_completions_days))
    runtime.add_worker("stored completions", workers.every(timedelta(seconds=10), repair, "stored_completions_not_looked_at"))
    _keep_records(runtime, rooms)
    uses = LastUses(rooms.tenants, rooms.authenticator)
    runtime.add_worker("uses of keys", workers.every(timedelta(seconds=settings.last_used_seconds), uses, "uses_of_keys_not_written"))
    runtime.add_worker("refusals", workers.every(timedelta(minutes=1), rooms.refusals, "refusals_not_written", last=True))
    _bootstrap(runtime, rooms.tenants, rooms.authenticator)
    if settings.authentication == "off":
        _let_everybody_in(runtime, rooms.tenants)
    face = application(rooms, _edge_limits(settings), settings.cors_origins)
    runtime.add_http_server(face, settings.host, settings.port, tls=settings.tls.listening_context(), protocol=UnswitchingProtocol)
    runtime.on_reload(_following(rooms, face))


def _following(rooms: Rooms, face: Cors) -> Prepare[GatewaySettings]:
    """What changes while the gateway runs; a request meets all of it as it was or all of it as it is."""

    def prepare(settings: GatewaySettings) -> Swap:
        allowances, names = settings.limits.allowances, settings.model_names

        def swap() -> None:
            rooms.gate.allow(allowances)
            rooms.models.names = names
            face.allow(settings.cors_origins)

        return swap

    return prepare


async def _rooms(runtime: Runtime[GatewaySettings], store: ObjectStore) -> Rooms:
    settings, database, bus = runtime.settings, runtime.database, runtime.bus
    patience = timedelta(seconds=settings.publish_timeout_seconds)
    log = BusLog(bus, patience)
    trail = OutboxAuditTrail(bus)
    runtime.add_dependency("publishing", required=False, check=_nothing, breaker=log.breaker)

    async def ready() -> tuple[bool, str]:
        report = await runtime.health.ready()
        return report.ready, report.status

    call_sums = PostgresCallSums(database)
    return Rooms(
        log=log,
        handoff=await _handoff(runtime, log),
        tokens=Tokens(settings.pepper),
        tenants=PostgresTenants(database, bus),
        datasets=StoredDatasets(database, store),
        generations=PostgresGenerations(database),
        stored=PostgresStoredCompletions(database),
        records=PostgresRecords(database),
        answers=PostgresAnswers(database),
        call_sums=call_sums,
        calls=Calls(call_sums),
        dead_letters=LoggedDeadLetters(bus, log.breaker, patience),
        decisions=PostgresDecisions(database, bus),
        trail=trail,
        refusals=Refusals(trail),
        authenticator=_authenticator(runtime),
        ready=ready,
        gate=_gate(runtime),
        prices=Prices({model: Price(price.prompt, price.completion) for model, price in settings.prices.items()}),
        generation=Limits(timedelta(seconds=settings.generation_timeout_seconds), timedelta(seconds=settings.keep_alive_seconds)),
        patience=timedelta(seconds=settings.question_timeout_seconds),
        key_environment=settings.key_environment,
        instance=settings.instance,
    )


def _keep_records(runtime: Runtime[GatewaySettings], rooms: Rooms) -> None:
    settings = runtime.settings
    consumers.register_records(runtime.bus, BatchRecords, rooms.prices)
    bookkeeper = Bookkeeper(rooms.records, rooms.log, rooms.prices, timedelta(days=settings.generation_records_days))
    forgetting = Forgetting(rooms.answers)
    runtime.add_worker("calls", workers.every(timedelta(seconds=5), rooms.calls, "calls_not_counted", last=True))
    runtime.add_worker("kept answers", workers.every(timedelta(minutes=1), forgetting, "kept_answers_not_looked_at"))
    runtime.add_worker("generation records", workers.every(timedelta(seconds=10), bookkeeper, "generation_records_not_looked_at"))


def _authenticator(runtime: Runtime[GatewaySettings]) -> Authenticator:
    settings, store = runtime.settings, PostgresKeys(runtime.database)
    if settings.authentication == "off":
        return Unauthenticated(store, settings.pepper, settings.development_tenant)
    return Authenticator(store, settings.pepper, _tokens(runtime))


def _tokens(runtime: Runtime[GatewaySettings]) -> TokenAuthenticator | None:
    """None where no provider is trusted. Its keys are there before the first token is."""
    settings = runtime.settings.oidc
    if (trust := settings.trust) is None:
        return None
    timeout, pause = timedelta(seconds=settings.timeout_seconds), timedelta(seconds=settings.unknown_key_seconds)
    client = issuer_client(settings.tls.context(), timeout)
    breaker = Breaker("issuer", failure_threshold=3, reset_after=pause)
    renewed, kept = timedelta(seconds=settings.keys_renewed_seconds), timedelta(seconds=settings.keys_kept_seconds)
    issuer = Issuer(client, trust.issuer, settings.jwks_url, timeout)
    issuer_keys = IssuerKeys(issuer, trust.algorithms, breaker, Freshness(renewed, pause, kept))
    runtime.add_dependency("issuer", required=False, check=issuer_keys.check, breaker=breaker)
    runtime.add_worker("keys of the issuer", workers.every(min(pause, renewed), issuer_keys, "issuer_keys_not_fetched"))
    runtime.on_close(client.aclose)
    return TokenAuthenticator(JwtAccessTokens(issuer_keys, trust), PostgresActiveTenants(runtime.database), trust.issuer, settings.rights)


def _gate(runtime: Runtime[GatewaySettings]) -> Gate:
    """Redis is asked only about callers that are limited."""
    redis = redis_client(runtime.settings.redis)
    breaker = Breaker("redis", failure_threshold=3, reset_after=timedelta(seconds=5))
    counters = RedisCounters(redis, breaker)
    runtime.add_dependency("redis", required=False, check=counters.check, breaker=breaker)
    runtime.on_close(redis.aclose)
    return Gate(counters, runtime.settings.limits.allowances)


async def _nothing() -> None:
    """Publishing is checked by publishing: only its breaker tells how it is."""


async def _handoff(runtime: Runtime[GatewaySettings], log: BusLog) -> Handoff:
    """What the folder holds is known before anything new is taken: it stands before it. Raises FatalError for a folder that fails."""
    settings = runtime.settings.spool
    if settings.folder is None:
        return Handoff(log)
    limits = SpoolLimits(settings.maximum_bytes, settings.segment_bytes, timedelta(milliseconds=settings.flush_milliseconds))
    store = DiskSpool(settings.folder, limits)
    handoff = Handoff(log, store, ttl=timedelta(seconds=settings.ttl_seconds))
    try:
        await store.open()
        await handoff.adopt()
    except OSError as error:
        raise FatalError(f"the folder of the spool cannot be used: {error}") from error
    runtime.on_close(store.close)
    return handoff


def _add_table(runtime: Runtime[GatewaySettings], handoff: Handoff, name: str, table: Table) -> None:
    """Required, except while Kafka is away and the spool takes events: then there is something to do without it."""

    async def check() -> None:
        if table.is_complete:
            return
        if handoff.takes:
            try:
                await runtime.bus.check_kafka()
            except RetryableError:
                return
        raise RetryableError("not read to its end yet")

    runtime.add_dependency(name, required=True, check=check)


def _drain_spool(runtime: Runtime[GatewaySettings], handoff: Handoff) -> None:
    """Ready also without Kafka, as long as the spool takes events."""

    async def check() -> None:
        if not handoff.takes:
            await runtime.bus.check_kafka()

    runtime.add_worker("spool", workers.drain_spool(handoff))
    runtime.add_dependency("kafka or spool", required=True, check=check)


def _edge_limits(settings: GatewaySettings) -> EdgeLimits:
    return EdgeLimits(
        body_bytes=settings.maximum_body_bytes,
        upload_bytes=settings.maximum_upload_bytes,
        body_timeout=timedelta(seconds=settings.body_timeout_seconds),
    )


def _let_everybody_in(runtime: Runtime[GatewaySettings], tenants: Tenants) -> None:
    """Makes the tenant of everybody once Kafka and Postgres answer; the gateway is not ready before."""
    tenant_id, made = runtime.settings.development_tenant, asyncio.Event()
    _log.warning("authentication is off: whoever reaches the port reads and writes the data of this tenant", tenant_id=tenant_id)

    async def work(stopping: asyncio.Event) -> None:
        patiently = retrying(_PATIENT, lambda error: isinstance(error, RetryableError) and not stopping.is_set())
        await patiently(make_tenant, tenants, tenant_id)
        made.set()
        await stopping.wait()

    async def check() -> None:
        if not made.is_set():
            raise RetryableError("the development tenant is not made yet")

    runtime.add_worker("development tenant", work)
    runtime.add_dependency("development tenant", required=True, check=check)


def _bootstrap(runtime: Runtime[GatewaySettings], tenants: Tenants, authenticator: Authenticator) -> None:
    """Makes the bootstrap key once Kafka and Postgres answer; the gateway is not ready before, unless an earlier start made it."""
    secret = runtime.settings.bootstrap_key
    key = keys.parse(secret.get_secret_value()) if secret else None
    if secret is None or key is None:
        return
    presented = f"Bearer {secret.get_secret_value()}"
    made = asyncio.Event()

    async def work(stopping: asyncio.Event) -> None:
        # The gateway serves before Kafka has answered: at every start this comes too early once or twice, which is no error.
        patiently = retrying(_PATIENT, lambda error: isinstance(error, RetryableError) and not stopping.is_set())
        await patiently(bootstrap, tenants, authenticator, runtime.settings.bootstrap_tenant, key)
        made.set()
        await stopping.wait()

    async def check() -> None:
        if not made.is_set():
            try:
                await authenticator.principal(presented)
            except ApiError as error:
                raise RetryableError("the bootstrap key is not stored yet") from error
            made.set()

    runtime.add_worker("bootstrap", work)
    runtime.add_dependency("bootstrap key", required=True, check=check)
