"""Structured logs: one JSON object per line, for our own loggers and for every library that uses the standard `logging` module."""

import logging
import logging.handlers
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
from opentelemetry import trace
from structlog.types import Processor

from tessera.telemetry.redaction import redacted
from tessera.telemetry.repeats import Repeats
from tessera.telemetry.settings import TelemetrySettings

_CAPTURED = ("uvicorn", "uvicorn.error", "uvicorn.access", "faststream", "aiokafka", "alembic", "sqlalchemy")
_QUIET = {
    "aiokafka": logging.WARNING,
    "alembic": logging.WARNING,
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "asyncio": logging.WARNING,
    "sqlalchemy": logging.WARNING,  # below it writes every statement with its values: people's texts
}

Event = MutableMapping[str, Any]


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose lines carry everything `bound` holds at the moment of the call. Never raises, never awaits."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


@contextmanager
def bound(**values: str | int | None) -> Iterator[None]:
    """Adds `values` (request_id, tenant_id, …) to every log line inside the block, tasks started in it included; None is left out."""
    with structlog.contextvars.bound_contextvars(**{name: value for name, value in values.items() if value is not None}):
        yield


def configure_logs(service: str, instance: str, settings: TelemetrySettings) -> None:
    """Routes structlog and the standard `logging` module to JSON lines. May be called again; the last call counts."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    _route_standard_logging(_handler(settings), _formatter(service, instance, shared), settings.log_level)


def _formatter(service: str, instance: str, shared: list[Processor]) -> logging.Formatter:
    def origin(_: Any, __: str, event: Event) -> Event:
        return {**event, "service": service, "instance": instance}

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            origin,
            _add_trace,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            _redact,
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ],
    )


def _handler(settings: TelemetrySettings) -> logging.Handler:
    if settings.log_file is None:
        return logging.StreamHandler(sys.stdout)
    settings.log_file.parent.mkdir(parents=True, exist_ok=True)
    return logging.handlers.RotatingFileHandler(settings.log_file, maxBytes=settings.log_file_bytes, backupCount=1, encoding="utf-8")


def _route_standard_logging(handler: logging.Handler, formatter: logging.Formatter, level: str) -> None:
    handler.setFormatter(formatter)
    handler.set_name(_HANDLER)
    handler.addFilter(Repeats("aiokafka"))
    root = logging.getLogger()
    remove_handler()
    root.addHandler(handler)
    for name in _CAPTURED:
        captured = logging.getLogger(name)
        captured.handlers.clear()
        captured.propagate = True
        captured.setLevel(logging.NOTSET)
    set_log_level(level)
    logging.captureWarnings(True)


def set_log_level(level: str) -> None:
    """From now on lines below `level` are not written; talkative libraries keep their own, higher one."""
    logging.getLogger().setLevel(level)
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(max(quiet, logging.getLevelName(level)))


_HANDLER = "tessera"
_OURS = frozenset({"ts", "level", "logger", "service", "instance", "trace_id", "span_id"})  # written here, never from outside


def remove_handler() -> None:
    """Detaches and closes our handler; others (a test runner's) stay."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == _HANDLER]:
        root.removeHandler(handler)
        handler.close()


def _add_trace(_: Any, __: str, event: Event) -> Event:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", f"{context.trace_id:032x}")
        event.setdefault("span_id", f"{context.span_id:016x}")
    return event


def _redact(_: Any, __: str, event: Event) -> Event:
    return {name: value if name in _OURS else redacted(value, name) for name, value in event.items()}
