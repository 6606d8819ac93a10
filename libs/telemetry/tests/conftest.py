"""Telemetry is one per process: every test that configures it gives it back."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tessera.telemetry import TelemetrySettings, shutdown
from tessera.telemetry.logs import remove_handler


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[TelemetrySettings]:
    """Logs to `log.jsonl` and spans to `traces/` in the test's folder."""
    level = logging.getLogger().level
    yield TelemetrySettings(log_file=tmp_path / "log.jsonl", trace_folder=tmp_path / "traces")
    shutdown()
    remove_handler()
    logging.captureWarnings(False)
    logging.getLogger().setLevel(level)
    structlog.reset_defaults()
