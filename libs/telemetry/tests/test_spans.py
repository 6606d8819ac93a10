import asyncio
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import SecretStr

from tessera.telemetry import TelemetrySettings, bound, configure, continued, current_traceparent, shutdown, span
from tessera.telemetry.files import prune, span_files
from tessera.testkit.waiting import eventually

pytestmark = pytest.mark.unit


def spans(settings: TelemetrySettings) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for path in span_files(settings.trace_folder) for line in path.read_text().splitlines()]
    return {span["name"]: span for span in found}


def test_spans_nest_and_carry_the_request(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    with bound(request_id="request-1"), span("outer", topic="ingest", partition=3, key=None), span("inner"):
        pass
    shutdown()
    found = spans(settings)
    assert found["inner"]["parent_id"] == found["outer"]["span_id"]
    assert found["inner"]["trace_id"] == found["outer"]["trace_id"]
    assert found["outer"]["attributes"] == {"topic": "ingest", "partition": 3, "tessera.request_id": "request-1"}
    assert found["outer"]["service"] == "memory"
    assert found["outer"]["duration_ms"] >= found["inner"]["duration_ms"]


def test_a_failed_span_names_the_type_and_not_the_message(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    with pytest.raises(KeyError), span("work"):
        raise KeyError("a user's words")
    shutdown()
    found = spans(settings)["work"]
    assert (found["status"], found["attributes"]) == ("error", {"error.type": "KeyError"})
    assert "words" not in json.dumps(found)


def test_cancellation_is_not_a_failure(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    with pytest.raises(asyncio.CancelledError), span("work"):
        raise asyncio.CancelledError
    shutdown()
    assert spans(settings)["work"]["status"] == "unset"


def test_a_trace_goes_on_in_another_process(settings: TelemetrySettings) -> None:
    configure("gateway", "gateway-1", settings)
    with span("asked"):
        traceparent = current_traceparent()
    assert traceparent is not None
    configure("memory", "memory-1", settings)
    with continued(traceparent), span("answered"):
        pass
    shutdown()
    found = spans(settings)
    assert found["answered"]["parent_id"] == found["asked"]["span_id"]
    assert found["answered"]["trace_id"] == found["asked"]["trace_id"]


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_without_a_usable_parent_a_new_trace_begins(settings: TelemetrySettings, traceparent: str | None) -> None:
    configure("memory", "memory-1", settings)
    with span("around"), continued(traceparent), span("work"):
        pass
    shutdown()
    found = spans(settings)
    assert found["work"]["parent_id"] is None
    assert found["work"]["trace_id"] != found["around"]["trace_id"]


async def test_tasks_keep_their_own_parents(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)

    async def request(number: int) -> None:
        with span(f"outer-{number}"):
            await asyncio.sleep(0)
            with span(f"inner-{number}"):
                await asyncio.sleep(0)

    await asyncio.gather(*(request(number) for number in range(5)))
    shutdown()
    found = spans(settings)
    for number in range(5):
        assert found[f"inner-{number}"]["parent_id"] == found[f"outer-{number}"]["span_id"]


async def test_a_span_is_on_disk_within_a_second(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    with span("work"):
        pass
    await eventually(lambda: "work" in spans(settings), timeout=timedelta(seconds=1))


def test_no_span_is_lost_at_shutdown(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    for number in range(5000):
        with span(f"work-{number}"):
            pass
    shutdown()
    assert len(spans(settings)) == 5000


def test_a_process_that_ends_without_shutdown_loses_none(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from tessera.telemetry import *\n"
        f"configure('memory', 'memory-1', TelemetrySettings(trace_folder=Path({str(tmp_path)!r})))\n"
        "with span('last'): pass\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    assert [json.loads(path.read_text())["name"] for path in span_files(tmp_path)] == ["last"]


def test_without_configuration_or_with_tracing_off_spans_cost_nothing_and_fail_nothing(settings: TelemetrySettings) -> None:
    with span("before"):
        assert current_traceparent() is None
    configure("memory", "memory-1", settings.model_copy(update={"tracing": False}))
    with span("work") as current:
        current.set_attribute("key", 1)
    shutdown()
    assert not settings.trace_folder.exists()


def test_sampling_out_keeps_the_callers_decision(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings.model_copy(update={"sample_ratio": 0.0}))
    with span("mine"):
        pass
    with continued(f"00-{'a' * 32}-{'b' * 16}-01"), span("theirs"):
        pass
    shutdown()
    assert set(spans(settings)) == {"theirs"}


def test_files_are_bounded(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings.model_copy(update={"trace_file_bytes": 4096, "flush_milliseconds": 10}))
    for _ in range(20):
        for number in range(20):
            with span(f"work-{number}"):
                pass
        configure("memory", "memory-1", settings.model_copy(update={"trace_file_bytes": 8192}))
    shutdown()
    files = span_files(settings.trace_folder)
    assert sorted(path.name for path in files) == ["memory.memory-1.jsonl", "memory.memory-1.jsonl.1"]
    assert sum(path.stat().st_size for path in files) <= 2 * 8192


def test_old_files_of_others_are_removed_first(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "mine", "old"]):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    prune(tmp_path, 150, keep=tmp_path / "mine.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "new.jsonl"]


def test_a_folder_that_cannot_be_made_is_told(settings: TelemetrySettings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        configure("memory", "memory-1", settings.model_copy(update={"trace_folder": tmp_path / "file" / "traces"}))


def test_a_folder_that_vanishes_loses_spans_and_fails_nobody(settings: TelemetrySettings) -> None:
    configure("memory", "memory-1", settings)
    settings.trace_folder.rmdir()
    with span("work"):
        pass
    shutdown()
    assert not settings.trace_folder.exists()


def test_names_with_odd_characters_stay_inside_the_folder(settings: TelemetrySettings) -> None:
    configure("memory", "../../host:1", settings)
    with span("work"):
        pass
    shutdown()
    assert [path.name for path in settings.trace_folder.iterdir()] == ["memory.______host_1.jsonl"]


class Collector(BaseHTTPRequestHandler):
    """A receiver of OTLP over HTTP that keeps what it got."""

    received: list[tuple[str | None, ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append((self.headers.get("authorization"), ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def collector() -> Iterator[HTTPServer]:
    Collector.received = []
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_go_to_a_collector_where_one_is_set(settings: TelemetrySettings, collector: HTTPServer) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    configure(
        "memory", "memory-1", settings.model_copy(update={"otlp_endpoint": endpoint, "otlp_headers": {"authorization": SecretStr("mine")}})
    )
    with bound(request_id="request-1"), span("work"):
        pass
    shutdown()
    ((authorization, request),) = Collector.received
    resource = {item.key: item.value.string_value for item in request.resource_spans[0].resource.attributes}
    sent = request.resource_spans[0].scope_spans[0].spans[0]
    assert authorization == "mine"
    assert (resource["service.name"], resource["service.instance.id"], sent.name) == ("tessera-memory", "memory-1", "work")
    assert not settings.trace_folder.exists()
