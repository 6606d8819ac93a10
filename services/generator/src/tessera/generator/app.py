"""The generator's process: the only place that builds anything."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from tessera.bus.service import Runtime, run_service
from tessera.encodings import encoding
from tessera.generator import consumers
from tessera.generator.adapters.chunk_sink import BusChunkSink
from tessera.generator.adapters.local_engines import NgramEngine, QuoteEngine
from tessera.generator.adapters.openai_compatible import OpenAICompatibleProvider
from tessera.generator.adapters.postgres_declarations import ModelDeclarations
from tessera.generator.adapters.postgres_jobs import PostgresIntake, PostgresJobStore
from tessera.generator.adapters.postgres_ngrams import PostgresNgramLearner, PostgresNgramReader
from tessera.generator.adapters.postgres_signals import JobListener
from tessera.generator.adapters.tokens import EncodingCounter
from tessera.generator.ports import Engine
from tessera.generator.settings import GeneratorSettings, ProviderSettings
from tessera.generator.workers import Closer, JobRunner, Lane, Signals


def main() -> None:
    """Runs the generator until it is told to stop."""
    run_service(GeneratorSettings, build)


async def build(runtime: Runtime[GeneratorSettings]) -> None:
    """Loads the encodings of its models before the first generation, so that none waits for them, and puts the generator together."""
    settings, bus, database = runtime.settings, runtime.bus, runtime.database
    models = settings.catalogue()
    await asyncio.gather(*(asyncio.to_thread(encoding, name) for name in models.encodings))
    policy = settings.worker_policy()
    signals = Signals()
    store = PostgresJobStore(database, bus)
    runner = JobRunner(store, BusChunkSink(bus), EncodingCounter(), signals, policy)
    for engine in _engines(runtime):
        runtime.add_worker(f"lane {engine.name}", Lane(engine, store, runner, signals, policy).run)
    runtime.add_worker("closer", Closer(store, signals, policy).run)
    runtime.add_worker("listener", JobListener(database, signals).run)
    runtime.add_worker("declarations", ModelDeclarations(bus, models).run)
    consumers.register(
        bus,
        consumers.Surroundings(
            models=models,
            time_limit=timedelta(seconds=settings.time_limit_seconds),
            encoding=settings.encoding,
            intake=PostgresIntake,
            learner=PostgresNgramLearner,
        ),
    )


def _engines(runtime: Runtime[GeneratorSettings]) -> list[Engine]:
    settings = runtime.settings
    local: list[Engine] = [
        NgramEngine(PostgresNgramReader(runtime.database), settings.encoding, concurrency=settings.ngram_concurrency),
        QuoteEngine(concurrency=settings.quote_concurrency),
    ]
    return [*local, *(_provider(runtime, provider) for provider in settings.providers)]


def _provider(runtime: Runtime[GeneratorSettings], settings: ProviderSettings) -> OpenAICompatibleProvider:
    provider = OpenAICompatibleProvider(
        settings.name,
        str(settings.base_url),
        api_key=settings.api_key,
        upstream_names={model.reference.model_id: model.upstream_name for model in settings.offered()},
        policy=settings.policy(),
        concurrency=settings.concurrency,
    )
    runtime.add_dependency(f"provider {settings.name}", required=False, check=provider.check, breaker=provider.breaker)
    runtime.on_close(provider.close)
    return provider


if __name__ == "__main__":
    main()
