"""What each step of one event costs in Python, in microseconds of processor time: `python tests/bench/bus/steps.py`. Needs no servers."""

import gc
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from tessera.bus.codec import decode, encode
from tessera.bus.outbox import pack_headers, unpack_headers
from tessera.bus.transaction import caused_envelope
from tessera.contracts.catalogue import TOPICS
from tessera.contracts.events import MemoryRecorded
from tessera.contracts.ids import body_digest, derived_id, identity_digest

REPEATS = 20_000
CONTENT = f"Event number 1: {'the lamp is lit ' * 6}"


def record() -> Any:
    """One as the bench publishes them."""
    headers = {
        "ce_specversion": "1.0",
        "ce_id": "abcdefab-1234",
        "ce_source": "/bench",
        "ce_type": "tessera.message.published.v1",
        "ce_tenantid": "bench",
        "ce_time": datetime.now(UTC).isoformat(),
        "content-type": "application/json",
    }
    value = json.dumps({"conversation_id": "c-1", "role": "user", "content": CONTENT}).encode()
    encoded = tuple((name, text.encode()) for name, text in headers.items())
    return SimpleNamespace(topic="ingest", partition=0, offset=1, timestamp=1, key=b"c-1", value=value, headers=encoded)


def microseconds(step: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    for _ in range(REPEATS):
        step()
    return round((time.process_time() - started) / REPEATS * 1e6, 1)


def main() -> None:
    """Every step by itself; one JSON line."""
    gc.collect()
    gc.disable()
    given = record()
    event = decode(given, TOPICS["ingest"], "ingest")
    fields: dict[str, Any] = {"memory_id": event.id, "kind": "message", "origin_id": event.id, "importance": 0.5, "text": CONTENT}
    moments = {"occurred_at": event.time, "recorded_at": event.time}
    recorded = MemoryRecorded(**fields, **moments)
    envelope = caused_envelope(event.origin, "memory", "recorded", 0)
    encoded = encode(recorded, envelope)
    packed = pack_headers(encoded.headers)
    steps: dict[str, Callable[[], object]] = {
        "decode and validate": lambda: decode(given, TOPICS["ingest"], "ingest"),
        "of which identity": lambda: identity_digest("bench", "/bench", event.id),
        "digest of the body": lambda: body_digest(given.value),
        "construct the outgoing event": lambda: MemoryRecorded(**fields, **moments),
        "origin": lambda: event.origin,
        "envelope": lambda: caused_envelope(event.origin, "memory", "recorded", 0),
        "of which derived id": lambda: derived_id(event.id, "recorded"),
        "encode": lambda: encode(recorded, envelope),
        "pack headers for the outbox": lambda: pack_headers(encoded.headers),
        "unpack them in the relay": lambda: unpack_headers(packed),
    }
    sys.stdout.write(json.dumps({name: microseconds(step) for name, step in steps.items()}) + "\n")


if __name__ == "__main__":
    main()
