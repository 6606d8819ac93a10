"""Spans as JSON lines on disk, for machines without a trace collector."""

import json
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult


class FileSpanExporter(SpanExporter):
    """Appends spans to `<folder>/<service>.<instance>.jsonl`; at `maximum_bytes` the file becomes `….jsonl.1`, replacing the one before.

    So one process takes at most about twice `maximum_bytes`. Files of other processes are removed, oldest first, while the folder is above
    `folder_maximum_bytes` at the start. Blocking; called from the exporting thread.
    """

    def __init__(self, folder: Path, service: str, instance: str, *, maximum_bytes: int, folder_maximum_bytes: int) -> None:
        self._service, self._instance, self._maximum_bytes = service, instance, maximum_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{_file_name(service)}.{_file_name(instance)}.jsonl"
        self._lock = threading.Lock()
        prune(folder, folder_maximum_bytes, keep=self._path)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes the batch with one append; a full disk loses the batch and is reported to the SDK, never raised."""
        data = "".join(f"{json.dumps(self._line(span), ensure_ascii=False, default=str)}\n" for span in spans).encode()
        with self._lock:
            try:
                self._append(data)
            except OSError:
                return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _append(self, data: bytes) -> None:
        if self._path.exists() and self._path.stat().st_size + len(data) > self._maximum_bytes:
            self._path.replace(self._path.with_suffix(".jsonl.1"))
        with self._path.open("ab") as file:
            file.write(data)

    def _line(self, span: ReadableSpan) -> dict[str, Any]:
        context, start, end = span.get_span_context(), span.start_time or 0, span.end_time or 0
        return {
            "trace_id": f"{context.trace_id:032x}" if context else None,
            "span_id": f"{context.span_id:016x}" if context else None,
            "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
            "name": span.name,
            "service": self._service,
            "instance": self._instance,
            "start": datetime.fromtimestamp(start / 1e9, UTC).isoformat(),
            "start_ns": start,
            "duration_ms": round((end - start) / 1e6, 3),
            "status": span.status.status_code.name.lower(),
            "attributes": dict(span.attributes or {}),
        }

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held back: every export is already on disk."""
        return True

    def shutdown(self) -> None:
        """Nothing is kept open."""


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def span_files(folder: Path) -> list[Path]:
    """All span files of the folder, rotated ones included, oldest change first."""
    files = [path for pattern in ("*.jsonl", "*.jsonl.1") for path in folder.glob(pattern)]
    return sorted(files, key=_modified)


def prune(folder: Path, maximum_bytes: int, *, keep: Path) -> None:
    """Removes the oldest span files until the folder holds at most `maximum_bytes`; `keep` stays."""
    files = [path for path in span_files(folder) if path != keep]
    total = sum(_size(path) for path in files)
    for path in files:
        if total <= maximum_bytes:
            return
        total -= _size(path)
        path.unlink(missing_ok=True)


# Another process may rotate or prune a file between the listing and the look at it: a vanished file counts as empty.
def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
