import json
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.telemetry import TelemetrySettings, bound, configure, continued, current_traceparent, shutdown, span
from tessera.telemetry.trace import main

pytestmark = pytest.mark.unit


@pytest.fixture
def traced(settings: TelemetrySettings) -> TelemetrySettings:
    """One request through two services, and one of somebody else."""
    configure("gateway", "gateway-1", settings)
    with bound(request_id="Request-1"), span("POST /v1/chat/completions", model="local/quote"):
        traceparent = current_traceparent()
    with bound(request_id="request-2"), span("another request"):
        pass
    configure("memory", "memory-1", settings)
    with continued(traceparent):
        with bound(request_id="Request-1"), span("recall"), span("embed"):
            pass
        with pytest.raises(KeyError), span("without request id"):
            raise KeyError
    shutdown()
    return settings


def printed(capsys: pytest.CaptureFixture[str], settings: TelemetrySettings, identifier: str) -> list[str]:
    assert main([identifier, "--folder", str(settings.trace_folder)]) == 0
    return capsys.readouterr().out.splitlines()


def test_prints_the_tree_of_a_request_over_all_services(traced: TelemetrySettings, capsys: pytest.CaptureFixture[str]) -> None:
    title, _, *rows = printed(capsys, traced, "Request-1")
    assert title.endswith(": 4 spans in gateway, memory")
    assert [row[29:] for row in rows] == [
        "gateway: POST /v1/chat/completions  model=local/quote",
        "  memory: recall",
        "    memory: embed",
        "  memory: without request id  FAILED  error.type=KeyError",
    ]
    assert all(" ms " in row for row in rows)


def test_a_trace_id_gives_the_same(traced: TelemetrySettings, capsys: pytest.CaptureFixture[str]) -> None:
    by_request = printed(capsys, traced, "Request-1")
    trace_id = by_request[0].split()[1].rstrip(":")
    assert printed(capsys, traced, trace_id) == by_request
    assert printed(capsys, traced, trace_id.upper()) == by_request


def test_an_unknown_id_is_told(traced: TelemetrySettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["request-3", "--folder", str(traced.trace_folder)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("No span of 'request-3' in ")


def test_a_missing_folder_is_an_unknown_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x", "--folder", str(tmp_path / "none")]) == 1
    assert "No span" in capsys.readouterr().err


def test_lines_cut_off_by_a_kill_are_passed_over(traced: TelemetrySettings, capsys: pytest.CaptureFixture[str]) -> None:
    whole = printed(capsys, traced, "Request-1")
    (traced.trace_folder / "killed.jsonl").write_text('{"trace_id": "Request-1\n["Request-1"]\n"Request-1"\n{}\n')
    (traced.trace_folder / "killed.jsonl.1").write_bytes(b'\xff\xfe{"name": "Request-1"')
    assert printed(capsys, traced, "Request-1") == whole


def test_rotated_files_are_read(traced: TelemetrySettings, capsys: pytest.CaptureFixture[str]) -> None:
    whole = printed(capsys, traced, "Request-1")
    for path in list(traced.trace_folder.glob("*.jsonl")):
        path.rename(f"{path}.1")
    assert printed(capsys, traced, "Request-1") == whole


def test_spans_whose_parents_are_missing_are_still_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(span_id: str, parent_id: str | None, start: int) -> str:
        fields = {"trace_id": "t", "span_id": span_id, "parent_id": parent_id, "name": span_id, "service": "s", "status": "unset"}
        return json.dumps({**fields, "start_ns": start, "duration_ms": 1.0, "attributes": {"tessera.request_id": "r"}})

    (tmp_path / "a.jsonl").write_text("\n".join([line("orphan", "elsewhere", 2), line("root", None, 1)]))
    assert main(["r", "--folder", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[-1] for row in rows] == ["root", "orphan"]


def test_as_a_program(traced: TelemetrySettings) -> None:
    command = [sys.executable, "-m", "tessera.telemetry.trace", "request-2", "--folder", str(traced.trace_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert "gateway: another request" in done.stdout
