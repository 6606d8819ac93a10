"""Is everything that one schema lets a writer say accepted by another schema's reader?

A conservative check of JSON Schema subsumption over the keywords that pydantic emits: it may call a harmless change
incompatible, never the reverse. A keyword that it does not know must be equal on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

Schema = dict[str, Any]

_ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "$defs", "discriminator", "deprecated", "$ref", "$schema", "$id"}
)
_LOWER_BOUNDS: Final = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER_BOUNDS: Final = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_STRUCTURE: Final = frozenset(
    {"type", "enum", "const", "anyOf", "oneOf", "properties", "required", "additionalProperties", "items", "prefixItems"}
)


def opened_schema(schema: Schema) -> Schema:
    """The reader's form of a closed schema: unknown properties are accepted everywhere."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items() if not (key == "additionalProperties" and item is False)}
        return [walk(item) for item in value] if isinstance(value, list) else value

    result: Schema = walk(schema)
    return result


def incompatibilities(writer: Schema, reader: Schema) -> list[str]:
    """What `writer` may say that `reader` would refuse, one sentence each; empty where all is accepted."""
    return list(_Comparison(writer, reader).differences(writer, reader, "$"))


class _Comparison:
    def __init__(self, writer: Schema, reader: Schema) -> None:
        self._writer_definitions = writer.get("$defs", {})
        self._reader_definitions = reader.get("$defs", {})
        self._under_way: set[tuple[str, str]] = set()

    def differences(self, writer: Any, reader: Any, path: str) -> Iterator[str]:
        if reader is True or reader == {}:
            return
        names = (_reference(writer), _reference(reader))
        if all(names):
            if names in self._under_way:
                return
            self._under_way.add(names)
        yield from self._resolved(_resolve(writer, self._writer_definitions), _resolve(reader, self._reader_definitions), path)
        self._under_way.discard(names)

    def _resolved(self, writer: Schema, reader: Schema, path: str) -> Iterator[str]:
        for branch in _branches(writer):
            yield from self._one(branch, reader, path)
        if not _branches(writer):
            yield from self._one(writer, reader, path)

    def _one(self, writer: Schema, reader: Schema, path: str) -> Iterator[str]:
        writer = _resolve(writer, self._writer_definitions)
        branches = _branches(reader)
        if not branches:
            yield from self._plain(writer, reader, path)
        elif not any(not list(self.differences(writer, branch, path)) for branch in branches):
            yield f"{path}: no alternative of the reader accepts {_name(writer)}"

    def _plain(self, writer: Schema, reader: Schema, path: str) -> Iterator[str]:
        yield from _values(writer, reader, path)
        yield from _types(writer, reader, path)
        yield from _bounds(writer, reader, path)
        yield from _unknown(writer, reader, path)
        yield from self._object(writer, reader, path)
        yield from self._array(writer, reader, path)

    def _object(self, writer: Schema, reader: Schema, path: str) -> Iterator[str]:
        for name in sorted(set(reader.get("required", [])) - set(writer.get("required", []))):
            yield f"{path}.{name}: the reader requires it, the writer may leave it out"
        known = reader.get("properties", {})
        others = reader.get("additionalProperties", True)
        for name, schema in writer.get("properties", {}).items():
            if name in known:
                yield from self.differences(schema, known[name], f"{path}.{name}")
            elif others is False:
                yield f"{path}.{name}: the reader does not know it and is closed"
            elif isinstance(others, dict):
                yield from self.differences(schema, others, f"{path}.{name}")
        free = writer.get("additionalProperties")
        if isinstance(free, dict) and isinstance(others, dict):
            yield from self.differences(free, others, f"{path}.*")

    def _array(self, writer: Schema, reader: Schema, path: str) -> Iterator[str]:
        if "items" in reader:
            yield from self.differences(writer.get("items", True), reader["items"], f"{path}[]")
        for index, schema in enumerate(reader.get("prefixItems", [])):
            given = writer.get("prefixItems", [])
            yield from self.differences(given[index] if index < len(given) else True, schema, f"{path}[{index}]")


def _reference(schema: Any) -> str:
    return str(schema.get("$ref", "")) if isinstance(schema, dict) else ""


def _resolve(schema: Any, definitions: Schema) -> Schema:
    while isinstance(schema, dict) and "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    return schema if isinstance(schema, dict) else {}


def _branches(schema: Schema) -> list[Any]:
    return [*schema.get("anyOf", []), *schema.get("oneOf", [])]


def _name(schema: Schema) -> str:
    return str(schema.get("title") or schema.get("type") or schema)


def _allowed(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _values(writer: Schema, reader: Schema, path: str) -> Iterator[str]:
    accepted, written = _allowed(reader), _allowed(writer)
    if accepted is None:
        return
    if written is None:
        yield f"{path}: the reader accepts only {accepted}"
        return
    for value in written:
        if value not in accepted:
            yield f"{path}: the reader does not accept the value {value!r}"


def _type_set(schema: Schema) -> set[str]:
    declared = schema.get("type", [])
    names = {declared} if isinstance(declared, str) else set(declared)
    return names | {"integer"} if "number" in names else names


def _types(writer: Schema, reader: Schema, path: str) -> Iterator[str]:
    if "type" not in reader:
        return
    if "type" not in writer:
        yield f"{path}: the writer may say any type, the reader accepts only {reader['type']}"
        return
    for name in sorted(_type_set(writer) - _type_set(reader)):
        yield f"{path}: the reader does not accept the type {name}"


def _bounds(writer: Schema, reader: Schema, path: str) -> Iterator[str]:
    for keyword in _LOWER_BOUNDS:
        if keyword in reader and writer.get(keyword, float("-inf")) < reader[keyword]:
            yield f"{path}: the reader's {keyword} {reader[keyword]} is above the writer's"
    for keyword in _UPPER_BOUNDS:
        if keyword in reader and writer.get(keyword, float("inf")) > reader[keyword]:
            yield f"{path}: the reader's {keyword} {reader[keyword]} is below the writer's"


def _unknown(writer: Schema, reader: Schema, path: str) -> Iterator[str]:
    known = _ANNOTATIONS | _STRUCTURE | set(_LOWER_BOUNDS) | set(_UPPER_BOUNDS)
    for keyword in sorted(set(reader) - known):
        if writer.get(keyword) != reader[keyword]:
            yield f"{path}: {keyword} differs"
