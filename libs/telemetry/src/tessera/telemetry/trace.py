"""`python -m tessera.telemetry.trace ID [--folder F]`: prints the spans of a request id or trace id as a tree.

Reads the span files of all services.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tessera.telemetry.files import span_files
from tessera.telemetry.settings import TelemetrySettings

Span = dict[str, Any]


def spans_of(identifier: str, folder: Path) -> list[Span]:
    """All spans of every trace that has this trace id, or in which a span carries this request id. Blocking; reads each file twice."""
    traces = {span["trace_id"] for span in _spans(folder, [identifier]) if _matches(span, identifier)}
    return [span for span in _spans(folder, sorted(traces)) if span["trace_id"] in traces] if traces else []


def _matches(span: Span, identifier: str) -> bool:
    return bool(span["trace_id"] == identifier.lower() or span["attributes"].get("tessera.request_id") == identifier)


def _spans(folder: Path, needles: Sequence[str]) -> Iterator[Span]:
    for line in _lines(folder):
        if any(needle in line or needle.lower() in line for needle in needles):
            yield from _parsed(line)


def _lines(folder: Path) -> Iterator[str]:
    for path in span_files(folder):
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                yield from file
        except FileNotFoundError:
            continue  # rotated or pruned by its owner while we read


def _parsed(line: str) -> Iterable[Span]:
    """The span of a line; none for a line that a killed process left unfinished."""
    try:
        span = json.loads(line)
    except ValueError:
        return ()
    return (span,) if isinstance(span, dict) and {"trace_id", "span_id", "attributes", "start_ns"} <= span.keys() else ()


def tree(spans: Sequence[Span]) -> list[str]:
    """One line per span, by start time: start after the first, duration, service, name, attributes; children indented below parents."""
    known = {span["span_id"] for span in spans}
    children: dict[str | None, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span["start_ns"]):
        parent = span["parent_id"] if span["parent_id"] in known else None
        children.setdefault(parent, []).append(span)
    zero = min(span["start_ns"] for span in spans)
    return [_line(span, depth, zero) for span, depth in _walk(children)]


def _walk(children: dict[str | None, list[Span]]) -> Iterator[tuple[Span, int]]:
    pending = [(span, 0) for span in reversed(children.get(None, []))]
    while pending:
        span, depth = pending.pop()
        yield span, depth
        pending.extend((child, depth + 1) for child in reversed(children.get(span["span_id"], [])))


def _line(span: Span, depth: int, zero: int) -> str:
    after, failed = (span["start_ns"] - zero) / 1e6, "  FAILED" if span["status"] == "error" else ""
    attributes = " ".join(f"{key}={value}" for key, value in span["attributes"].items() if key != "tessera.request_id")
    name = f"{'  ' * depth}{span['service']}: {span['name']}"
    return f"{after:>10.1f} ms {span['duration_ms']:>10.1f} ms  {name}{failed}{'  ' + attributes if attributes else ''}"


def report(identifier: str, folder: Path) -> str | None:
    """The text to print, or None when nothing is known under this id."""
    spans = spans_of(identifier, folder)
    if not spans:
        return None
    by_trace = {
        trace_id: [span for span in spans if span["trace_id"] == trace_id] for trace_id in sorted({span["trace_id"] for span in spans})
    }
    return "\n".join(line for trace_id, members in by_trace.items() for line in _trace_lines(trace_id, members))


def _trace_lines(trace_id: str, spans: Sequence[Span]) -> list[str]:
    services = sorted({span["service"] for span in spans})
    return [
        f"trace {trace_id}: {len(spans)} spans in {', '.join(services)}",
        f"{'start':>13} {'duration':>13}  service: span",
        *tree(spans),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when something was printed, 1 when nothing is known under the id."""
    parser = argparse.ArgumentParser(prog="python -m tessera.telemetry.trace", description="Print the spans of a request id or trace id.")
    parser.add_argument("id", help="the x-request-id of a request, or a trace id of 32 hex digits")
    parser.add_argument("--folder", type=Path, default=TelemetrySettings().trace_folder, help="where the services write their span files")
    given = parser.parse_args(arguments)
    found = report(given.id, given.folder)
    if found is None:
        sys.stderr.write(
            f"No span of {given.id!r} in {given.folder}: the id is unknown, older than the files kept, or traces go to a collector.\n"
        )
        return 1
    sys.stdout.write(f"{found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
