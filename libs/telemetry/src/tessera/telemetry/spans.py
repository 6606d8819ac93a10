"""Spans across tasks, processes and Kafka (W3C Trace Context)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tessera.telemetry.files import FileSpanExporter
from tessera.telemetry.settings import TelemetrySettings

Attribute = str | bool | int | float | None

_PROPAGATOR = TraceContextTextMapPropagator()
_QUEUE = 16_384


class _Tracing:
    """The process's one tracer; a class attribute, because spans are opened from everywhere."""

    provider: TracerProvider | None = None
    tracer: trace.Tracer = trace.NoOpTracer()


def configure_spans(service: str, instance: str, settings: TelemetrySettings) -> None:
    """Starts the exporting thread. Spans of an earlier configuration are flushed first."""
    shutdown_spans()
    if not settings.tracing:
        return
    resource = Resource.create({"service.name": f"tessera-{service}", "service.instance.id": instance})
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(settings.sample_ratio), resource=resource, shutdown_on_exit=True)
    provider.add_span_processor(
        BatchSpanProcessor(
            _exporter(service, instance, settings),
            max_queue_size=_QUEUE,
            schedule_delay_millis=settings.flush_milliseconds,
            max_export_batch_size=1024,
        )
    )
    _Tracing.provider, _Tracing.tracer = provider, provider.get_tracer("tessera")


def _exporter(service: str, instance: str, settings: TelemetrySettings) -> SpanExporter:
    if settings.otlp_endpoint is None:
        return FileSpanExporter(
            settings.trace_folder,
            service,
            instance,
            maximum_bytes=settings.trace_file_bytes,
            folder_maximum_bytes=settings.trace_folder_bytes,
        )
    # Imported only where it is used: it loads protobuf and an HTTP client.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    headers = {name: value.get_secret_value() for name, value in settings.otlp_headers.items()}
    return OTLPSpanExporter(endpoint=settings.otlp_endpoint, headers=headers, timeout=settings.otlp_timeout_seconds)


def shutdown_spans() -> None:
    """Exports every finished span and stops the thread. Blocks until done or the exporter's time-out."""
    provider, _Tracing.provider, _Tracing.tracer = _Tracing.provider, None, trace.NoOpTracer()
    if provider is not None:
        provider.shutdown()


@contextmanager
def span(name: str, **attributes: Attribute) -> Iterator[trace.Span]:
    """A span around the block, child of the current one. Attributes that are None are left out.

    Inside `bound(request_id=…)` it carries `tessera.request_id`. An exception marks it as failed with the exception's type (messages may
    hold content and are not recorded) and goes on. Plain `with`, also in async code.
    """
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    given = {key: value for key, value in attributes.items() if value is not None}
    if request_id is not None:
        given["tessera.request_id"] = str(request_id)
    with _Tracing.tracer.start_as_current_span(name, attributes=given, record_exception=False, set_status_on_exception=False) as current:
        try:
            yield current
        except Exception as error:
            _mark_failed(current, error)
            raise


def _mark_failed(current: trace.Span, error: Exception) -> None:
    kind = type(error).__name__
    current.set_attribute("error.type", kind)
    current.set_status(trace.Status(trace.StatusCode.ERROR, kind))


def annotate(attributes: Mapping[str, Attribute]) -> None:
    """Adds to the current span what is known only later; nothing outside any."""
    current = trace.get_current_span()
    for name, value in attributes.items():
        if value is not None:
            current.set_attribute(name, value)


def current_traceparent() -> str | None:
    """The `traceparent` header of the current span, to hand to whoever continues the trace; None outside any span."""
    current = trace.get_current_span()
    if current is trace.INVALID_SPAN or not current.get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def continued(traceparent: str | None) -> Iterator[None]:
    """Spans in the block become children of the remote span named by `traceparent`. None or a malformed value starts a new trace."""
    parent = _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {}, context=otel_context.Context())
    token = otel_context.attach(parent)
    try:
        yield
    finally:
        otel_context.detach(token)
