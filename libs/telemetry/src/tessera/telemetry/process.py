"""Sets up and ends a process's telemetry."""

from tessera.telemetry import metrics
from tessera.telemetry.logs import configure_logs
from tessera.telemetry.settings import TelemetrySettings
from tessera.telemetry.spans import configure_spans, shutdown_spans


def configure(service: str, instance: str, settings: TelemetrySettings) -> None:
    """Starts logging and tracing for this process as `service`, replica `instance`.

    May be called again (the last call counts). Raises OSError when a log or trace folder cannot be made.
    """
    configure_logs(service, instance, settings)
    configure_spans(service, instance, settings)
    metrics.SERVICE_INFO.labels(service=service, instance=instance).set(1)


def shutdown() -> None:
    """Exports all finished spans; logging goes on. Blocks for at most the exporter's time-out; safe to call twice."""
    shutdown_spans()
