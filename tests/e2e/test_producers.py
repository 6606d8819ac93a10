"""The examples of docs/producers.md run as printed (on this test's topics) and what they publish is remembered."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.local.kafka import cached_distribution
from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PAGE = (Path(__file__).parents[2] / "docs" / "producers.md").read_text(encoding="utf-8")


def _example(platform: Platform, language: str, event_id: str) -> str:
    """The page's only example in a language, with this test's topics and an id of its own."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return code.replace('"ingest"', f'"{platform.kafka_prefix}ingest"').replace('"m-1"', f'"{event_id}"')


def _run(platform: Platform, command: list[str], folder: Path) -> None:
    environment = {**os.environ, **platform.client_environment()}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def _remembered(platform: Platform, event_id: str) -> bool:
    return bool(platform.request("GET", f"/v1/ingest/{event_id}").json()["status"] in {"applied", "searchable"})


def test_python(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "publish.py").write_text(_example(platform, "python", "doc-python"))
    _run(platform, [sys.executable, "publish.py"], tmp_path)
    assert eventually_blocking(lambda: _remembered(platform, "doc-python"), 30)


def test_java(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "Publish.java").write_text(_example(platform, "java", "doc-java"))
    jars = cached_distribution().class_path
    _run(platform, ["java", "-cp", jars, "Publish.java"], tmp_path)
    assert eventually_blocking(lambda: _remembered(platform, "doc-java"), 30)


def test_kcat(platform: Platform, tmp_path: Path) -> None:
    if shutil.which("kcat") is None:
        pytest.skip("kcat is not installed: its example in docs/producers.md was NOT run")
    (script,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    names = {"-t ingest": f"-t {platform.kafka_prefix}ingest", "-t refused.default": f"-t {platform.kafka_prefix}refused.default"}
    for printed, meant in {**names, "ce_id=m-1": "ce_id=doc-kcat"}.items():
        assert printed in script
        script = script.replace(printed, meant)
    _run(platform, ["bash", "-euo", "pipefail", "-c", script], tmp_path)
    assert eventually_blocking(lambda: _remembered(platform, "doc-kcat"), 30)


def test_node(platform: Platform, tmp_path: Path) -> None:
    installed = shutil.which("npm") and subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund", "kafkajs@2.2.4"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        timeout=100,
    )
    if not installed or installed.returncode != 0:
        pytest.skip("Node or its registry is not there: its example in docs/producers.md was NOT run")
    (tmp_path / "publish.js").write_text(_example(platform, "js", "doc-node"))
    _run(platform, ["node", "publish.js"], tmp_path)
    assert eventually_blocking(lambda: _remembered(platform, "doc-node"), 30)
