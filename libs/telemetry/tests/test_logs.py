import asyncio
import json
import logging
import sys
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tessera.telemetry import TelemetrySettings, bound, configure, get_logger, span
from tessera.telemetry.redaction import redacted

pytestmark = pytest.mark.unit


def lines(settings: TelemetrySettings) -> list[dict[str, Any]]:
    assert settings.log_file is not None
    return [json.loads(line) for line in settings.log_file.read_text().splitlines()]


async def test_a_line_says_when_who_and_for_whom(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    with bound(request_id="request-1", tenant_id="tenant-1"), span("work"):
        get_logger("tessera.memory").info("memory recorded", version=3)
    (line,) = lines(settings)
    moment = datetime.fromisoformat(line.pop("ts"))
    assert moment.utcoffset() == timedelta(0)
    assert (len(line.pop("trace_id")), len(line.pop("span_id"))) == (32, 16)
    assert line == {
        "level": "info",
        "event": "memory recorded",
        "logger": "tessera.memory",
        "service": "memory",
        "instance": "memory-1",
        "request_id": "request-1",
        "tenant_id": "tenant-1",
        "version": 3,
    }


@pytest.mark.parametrize("name", ["uvicorn.error", "uvicorn.access", "aiokafka.consumer", "faststream", "alembic.runtime", "anything"])
def test_libraries_log_the_same_way(settings: TelemetrySettings, name: str) -> None:
    logging.getLogger(name.partition(".")[0]).addHandler(logging.NullHandler())
    configure("memory", "memory-1", settings)
    with bound(request_id="request-1"):
        logging.getLogger(name).warning("lost %s of %d", "one", 2, extra={"partition": 4})
    (line,) = lines(settings)
    assert (line["event"], line["logger"], line["request_id"], line["service"], line["partition"]) == (
        "lost one of 2",
        name,
        "request-1",
        "memory",
        4,
    )


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_statements_and_their_values_are_never_logged(settings: TelemetrySettings, level: str) -> None:
    configure("memory", "memory-1", settings.model_copy(update={"log_level": level}))
    logging.getLogger("sqlalchemy.engine.Engine").info("[cached] ('The key is under the mat.',)")
    assert lines(settings) == []


async def test_what_is_bound_ends_with_the_block_and_stays_in_its_task(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    log = get_logger("x")

    async def request(number: int) -> None:
        with bound(request_id=f"request-{number}", tenant_id=None):
            await asyncio.sleep(0)
            log.info("inside", number=number)
        log.info("outside", number=number)

    await asyncio.gather(*(request(number) for number in range(5)))
    for line in lines(settings):
        expected = f"request-{line['number']}" if line["event"] == "inside" else None
        assert line.get("request_id") == expected
        assert "tenant_id" not in line


def test_exceptions_are_written_with_their_traceback(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    try:
        {"a": 1}["missing"]
    except KeyError:
        get_logger("x").exception("failed")
    (line,) = lines(settings)
    assert "KeyError: 'missing'" in line["exception"]


def test_the_level_holds_for_both_kinds_of_logger(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings.model_copy(update={"log_level": "WARNING"}))
    for log in (get_logger("x"), logging.getLogger("y")):
        log.info("not this")
        log.warning("this")
    assert [line["event"] for line in lines(settings)] == ["this", "this"]


def test_chatty_libraries_are_heard_from_warning_on(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    logging.getLogger("aiokafka.consumer.fetcher").info("fetching")
    assert lines(settings) == []


def test_warnings_are_log_lines(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
    assert "old way" in lines(settings)[0]["event"]


def test_configuring_again_writes_each_line_once_under_the_new_name(settings: TelemetrySettings) -> None:
    log = get_logger("x")
    configure("memory", "memory-1", settings)
    log.info("before")
    configure("tokenizer", "tokenizer-1", settings)
    log.info("after")
    assert [(line["event"], line["service"]) for line in lines(settings)] == [("before", "memory"), ("after", "tokenizer")]


def test_standard_output_is_the_default(settings: TelemetrySettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        configure("memory", "memory-1", settings.model_copy(update={"log_file": None}))
        get_logger("x").info("seen", word="ß→")
    assert json.loads((tmp_path / "out").read_text())["word"] == "ß→"


def test_the_log_file_is_bounded(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings.model_copy(update={"log_file_bytes": 4096}))
    for number in range(200):
        get_logger("x").info("line", number=number, text="x" * 100)
    assert settings.log_file is not None
    sizes = [path.stat().st_size for path in settings.log_file.parent.glob("log.jsonl*")]
    assert len(sizes) == 2
    assert max(sizes) <= 4096
    assert lines(settings)[-1]["number"] == 199


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("password", "hidden-value"),
        ("kafka_password", "hidden-value"),
        ("Authorization", "hidden-value"),
        ("api_key", "hidden-value"),
        ("token", "hidden-value"),
        ("access_token", "hidden-value"),
        ("anything", SecretStr("hidden-value")),
        ("url", "postgresql://me:hidden-value@host/db"),
        ("header", "Bearer hidden-value"),
        ("text", "key sk-hidden-value-0123456789"),
        ("text", "connect(password='hidden-value')"),
        ("nested", {"inner": [{"secret": "hidden-value"}, SecretStr("hidden-value")]}),
    ],
)
def test_secrets_are_not_written(settings: TelemetrySettings, name: str, value: object) -> None:
    configure("memory", "memory-1", settings)
    get_logger("x").info("settings", **{name: value})
    logging.getLogger("y").warning("settings", extra={name: value})
    assert settings.log_file is not None
    text = settings.log_file.read_text()
    assert "hidden-value" not in text
    assert text.count("[redacted]") >= 2


def test_secrets_in_messages_and_tracebacks_are_not_written(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    address = "postgresql://me:hidden-value@host/db"
    get_logger("x").info(f"connecting to {address}")
    logging.getLogger("y").warning("connecting to %s", address)
    try:
        int(address)
    except ValueError:
        get_logger("x").exception("failed")
    assert settings.log_file is not None
    assert "hidden-value" not in settings.log_file.read_text()
    assert len(lines(settings)) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("tokens", 12), ("token_count", 3), ("key", "memory/1"), ("secretary", "Ann"), ("n", None), ("ok", True)]
)
def test_plain_values_are_left_alone(name: str, value: object) -> None:
    assert redacted(value, name) == value


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
)
def test_redaction_never_fails_and_is_idempotent(value: object) -> None:
    once = redacted(value)
    assert redacted(once) == once
