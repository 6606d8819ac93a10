"""Logs, traces, metrics and health of every service.

Call `configure` once per process before anything is logged and `shutdown` at the end; everything else may be called at any time, also
without `configure` (logs then go to structlog's default and spans are dropped).
"""

from tessera.telemetry.admin import admin_app, listening_socket, serve_admin
from tessera.telemetry.health import (
    DependencyReport,
    Health,
    LiveReport,
    ReadyReport,
)
from tessera.telemetry.logs import bound, get_logger, set_log_level
from tessera.telemetry.process import configure, shutdown
from tessera.telemetry.settings import TelemetrySettings
from tessera.telemetry.spans import annotate, continued, current_traceparent, span

__all__ = [
    "DependencyReport",
    "Health",
    "LiveReport",
    "ReadyReport",
    "TelemetrySettings",
    "admin_app",
    "annotate",
    "bound",
    "configure",
    "continued",
    "current_traceparent",
    "get_logger",
    "listening_socket",
    "serve_admin",
    "set_log_level",
    "shutdown",
    "span",
]
