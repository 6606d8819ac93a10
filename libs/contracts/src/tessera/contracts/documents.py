"""`docs/events.md` and the AsyncAPI 3 document, generated from the catalogue, the classes and the examples.

python -m tessera.contracts.documents write    writes both below docs/
python -m tessera.contracts.documents check    exit 1 where a committed one is stale
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tessera.contracts.base import EventData
from tessera.contracts.catalogue import RETRY_TOPICS, TOPICS, Topic, dead_letter_topic
from tessera.contracts.schemas import SchemaStore, reader_schema, writer_schema

_ATTRIBUTES: Final = {
    "ce_specversion": "`1.0`.",
    "ce_id": "Identity within (tenant, source): a repeat with the same body is recognised, with another body it is refused.",
    "ce_source": "Who says it, a URI reference such as `/chat-app`.",
    "ce_type": "The event's type below.",
    "ce_time": "RFC 3339; the time of the record where absent.",
    "ce_tenantid": "The tenant. Required on the shared `ingest`; on `ingest.<tenant>` it must match where given.",
    "ce_subjectid": "The person or thing the data is about: the unit of erasure. Optional.",
    "ce_requestid": "Follows a request through logs and traces. Optional.",
    "ce_deadline": "RFC 3339; an event past it is answered `expired` without effect. Optional.",
    "ce_traceparent": "W3C trace context. Optional.",
    "ce_sequence": "The producer's order within a conversation. Optional.",
    "content-type": "`application/json`.",
}


def events_page(store: SchemaStore) -> str:
    """`docs/events.md`."""
    return "\n".join(_page(store)) + "\n"


def asyncapi(store: SchemaStore) -> dict[str, Any]:
    """The AsyncAPI 3.0.0 document of every topic."""
    events = [event for topic in TOPICS.values() for event in topic.event_types]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Tessera",
            "version": "1",
            "description": "CloudEvents 1.0 in Kafka binary mode. Generated from the topic catalogue by `make schemas`.",
        },
        "defaultContentType": "application/json",
        "channels": {topic.name: _channel(topic) for topic in TOPICS.values()},
        "operations": dict(_operations()),
        "components": {
            "messages": {_message_name(event): _message(store, event) for event in events},
            "messageTraits": {"cloudEvent": {"headers": _headers()}},
        },
    }


def _page(store: SchemaStore) -> Iterator[str]:
    yield "# Events\n"
    yield "Generated from `libs/contracts` by `make schemas`; do not edit. `asyncapi.json` beside this page says the same to machines.\n"
    yield "## On the wire\n"
    yield "CloudEvents 1.0, Kafka binary mode: attributes are headers, the value is the JSON of the event's data.\n"
    yield "| header | meaning |\n|---|---|"
    yield from (f"| `{name}` | {meaning} |" for name, meaning in _ATTRIBUTES.items())
    yield "\n## Topics\n"
    yield "| topic | carries | key | partitions | kept | from | to (class, mode) |\n|---|---|---|---|---|---|---|"
    yield from (_topic_row(topic) for topic in TOPICS.values())
    yield "\nDead letters of a consumer: `<topic>.<service>.dlq`. Consumer groups: `<service>.<class>`.\n"
    waiting = ", ".join(f"`{name}`" for name in RETRY_TOPICS)
    yield f"Where order does not matter, events that cannot be handled yet wait in a retry topic ([retries](retries.md)): {waiting}.\n"
    yield "## Types"
    for topic in TOPICS.values():
        for event in topic.event_types:
            yield from _event_section(store, topic, event)


def _topic_row(topic: Topic) -> str:
    name = f"`{topic.name}`" + (f", `{topic.name}.<tenant>`" if topic.per_tenant else "")
    kept = "compacted" if topic.compacted else _duration(topic)
    consumers = ", ".join(f"{c.service} ({c.traffic_class}, {c.mode})" for c in topic.consumers) or "whoever wants them"
    carries = ", ".join(f"[{event.__name__}](#{event.__name__.lower()})" for event in topic.event_types)
    return f"| {name} | {carries} | {_cell(topic.key)} | {topic.partitions} | {kept} | {', '.join(topic.producers)} | {consumers} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _duration(topic: Topic) -> str:
    if topic.retention is None:
        return "for ever"
    hours = round(topic.retention.total_seconds() / 3600)
    return f"{hours // 24} d" if hours % 24 == 0 else f"{hours} h"


def _event_section(store: SchemaStore, topic: Topic, event: type[EventData]) -> Iterator[str]:
    yield f"\n### {event.__name__}\n"
    yield f"`{event.event_type}` on `{topic.name}`. {(event.__doc__ or '').strip()}\n"
    schema = writer_schema(event)
    required = set(schema.get("required", []))
    rows = [_field_row(name, field, name in required) for name, field in schema.get("properties", {}).items()]
    if rows:
        yield "| field | type | | |\n|---|---|---|---|"
        yield from rows
    for name, example in store.examples(event).items():
        yield f"\n<details><summary>{name.removesuffix('.json')}</summary>\n"
        yield f"```json\n{json.dumps(example['data'], ensure_ascii=False, indent=1)}\n```\n\n</details>"


def _field_row(name: str, field: dict[str, Any], required: bool) -> str:
    presence = "required" if required else "optional"
    return f"| `{name}` | {_type(field)} | {presence} | {_cell(field.get('description', ''))} |"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"].rsplit("/", 1)[1])
    for keyword in ("anyOf", "oneOf"):
        if keyword in field:
            return " or ".join(_type(branch) for branch in field[keyword])
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("format") or field.get("type") or "any JSON") + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    if "minLength" in field or "maxLength" in field:
        return f", {field.get('minLength', 0)}-{field.get('maxLength', '')} characters"
    lowest, highest = field.get("minimum", ""), field.get("maximum", "")
    return f", {lowest}-{highest}" if f"{lowest}{highest}" else ""


def _channel(topic: Topic) -> dict[str, Any]:
    messages = {_message_name(event): {"$ref": f"#/components/messages/{_message_name(event)}"} for event in topic.event_types}
    binding = {"topic": topic.name, "partitions": topic.partitions, "bindingVersion": "0.5.0"}
    return {"address": topic.name, "description": topic.description, "messages": messages, "bindings": {"kafka": binding}}


def _operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for topic in TOPICS.values():
        channel = {"$ref": f"#/channels/{topic.name}"}
        for producer in topic.producers:
            yield f"{producer}.sends.{topic.name}", {"action": "send", "channel": channel}
        for consumer in topic.consumers:
            description = f"{consumer.mode} delivery; dead letters on {dead_letter_topic(topic.name, consumer.service)}"
            name = f"{consumer.service}.receives.{topic.name}"
            yield name, {"action": "receive", "channel": channel, "description": description}


def _message_name(event: type[EventData]) -> str:
    return event.event_type


def _message(store: SchemaStore, event: type[EventData]) -> dict[str, Any]:
    return {
        "name": event.event_type,
        "title": event.__name__,
        "summary": (event.__doc__ or "").strip(),
        "contentType": "application/json",
        "payload": _self_contained(reader_schema(event), event),
        "traits": [{"$ref": "#/components/messageTraits/cloudEvent"}],
        "examples": [{"name": name.removesuffix(".json"), "payload": example["data"]} for name, example in store.examples(event).items()],
    }


def _self_contained(schema: dict[str, Any], event: type[EventData]) -> dict[str, Any]:
    """Local references must start at the document's root once the schema is part of it."""
    base = f"#/components/messages/{_message_name(event)}/payload/$defs/"
    text = json.dumps(schema).replace('"#/$defs/', f'"{base}')
    result: dict[str, Any] = json.loads(text)
    return result


def _headers() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["ce_specversion", "ce_id", "ce_source", "ce_type"],
        "properties": {name: {"type": "string", "description": meaning} for name, meaning in _ATTRIBUTES.items()},
    }


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    store = SchemaStore(Path("libs/contracts"))
    document = json.dumps(asyncapi(store), indent=1, ensure_ascii=False) + "\n"
    pages = {Path("docs/events.md"): events_page(store), Path("docs/asyncapi.json"): document}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if arguments[:1] != ["write"]:
        sys.stderr.writelines(f"{path} is stale: run `make schemas`\n" for path in stale)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
