"""The tour is an end-to-end test: it must hold on any platform, also a second time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

TOUR = Path(__file__).with_name("tour.py")


def _go(platform: Platform, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, **platform.client_environment(), "TESSERA__KAFKA__TOPIC_PREFIX": platform.kafka_prefix}
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, str(TOUR), "--report", str(report)], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(report.read_text()))


def test_the_tour_holds_and_can_be_repeated(platform: Platform, tmp_path: Path) -> None:
    first, second = _go(platform, tmp_path), _go(platform, tmp_path)
    assert first["run"] != second["run"]
    assert set(first["seconds"]) == set(second["seconds"])
    assert _logs_that_hold(platform, "flowerpot") == [], "people's texts do not belong into logs"


def _logs_that_hold(platform: Platform, word: str) -> list[str]:
    logs = list((platform.home / "logs").iterdir())
    assert any(log.stat().st_size for log in logs)
    return [log.name for log in logs if word in log.read_text(errors="replace")]


def test_the_tour_says_what_is_missing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TESSERA", "KAFKA", "DATABASE"))}
    done = subprocess.run([sys.executable, str(TOUR)], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "make run" in done.stderr
