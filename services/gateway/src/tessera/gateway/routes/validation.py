"""From pydantic's errors to OpenAI's: one code and one `param` per request."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tessera.gateway.domain.errors import ApiError

_MISSING: Final = "missing"
_UNKNOWN: Final = "extra_forbidden"
_TAGS: Final = ("union_tag_invalid", "union_tag_not_found")

Described = tuple[str, str]
Steps = tuple[str | int, ...]


def of_validation(found: Sequence[Any], body: Any, prefix: str = "") -> ApiError:
    """OpenAI's answer to a request that does not fit its schema: of several errors the one that tells most."""
    error = max(found, key=lambda candidate: _tells(candidate, body))
    if error["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "We could not parse the JSON body of your request.")
    location, keep_last = error["loc"], error["type"] in (_MISSING, _UNKNOWN)
    if error["type"] in _TAGS:  # said of the whole object; what is wrong is the field that names its kind
        location, keep_last = (*location, error["ctx"]["discriminator"].strip("'")), True
    param = prefix + parameter(location, body, keep_last=keep_last)
    code, message = _described(error, param or "body")
    return ApiError(400, code, message, param=param or None)


def _tells(error: Any, body: Any) -> tuple[int, bool]:
    """How much an error tells: the deeper the more, and what is wrong with the right type more than another member's type."""
    path = _path(error["loc"], body, keep_last=error["type"] in (_MISSING, _UNKNOWN))
    return len(path), not error["type"].endswith("_type")


def parameter(location: Sequence[str | int], body: Any, *, keep_last: bool) -> str:
    """`messages[0].role` from pydantic's location, which also names the members of unions that it tried."""
    text = ""
    for step in _path(location, body, keep_last=keep_last):
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _path(location: Sequence[str | int], body: Any, *, keep_last: bool) -> list[str | int]:
    """The steps that lead into the body; `keep_last` for a step that is not there and ought to be, or ought not to be."""
    if location and location[0] in ("query", "path", "header", "cookie"):
        return list(location[1:])
    steps = location[1:] if location and location[0] == "body" else location
    return _walk(tuple(steps), body, keep_last=keep_last)[1]


def _walk(steps: Steps, value: Any, *, keep_last: bool) -> tuple[bool, list[str | int]]:
    """Whether the last step was taken, and the steps taken.

    A step may be the name of a union's member and not lead anywhere, even where a field has that name: of both readings the one that takes
    the last step counts, then the longer one.
    """
    if not steps:
        return True, []
    step, rest = steps[0], steps[1:]
    inside = _inside(value, step)
    if not rest and (inside or keep_last):
        return True, [step]
    skipped = _walk(rest, value, keep_last=keep_last) if rest else (False, [])
    if not inside:
        return skipped
    arrived, path = _walk(rest, value[step], keep_last=keep_last)
    return max((arrived, [step, *path]), skipped, key=lambda reading: (reading[0], len(reading[1])))


def _inside(value: Any, step: str | int) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _described(error: Any, param: str) -> Described:
    kind = error["type"]
    if describe := _DESCRIBERS.get(kind):
        return describe(error, param)
    if kind.endswith(("_type", "_parsing", "_from_float")):
        return "invalid_type", f"Invalid type for '{param}': {error['msg']}."
    return "invalid_value", f"Invalid '{param}': {error['msg'].removeprefix('Value error, ')}."


def _missing(_: Any, param: str) -> Described:
    return "missing_required_parameter", f"Missing required parameter: '{param}'."


def _unknown(_: Any, param: str) -> Described:
    return "unknown_parameter", f"Unknown parameter: '{param}'."


def _too_short(error: Any, param: str) -> Described:
    if isinstance(error.get("input"), str):
        return _text_too_short(error, param)
    minimum = error["ctx"]["min_length"]
    if not error.get("input"):
        wanted = f"Expected an array with minimum length {minimum}, but got an empty array instead."
        return "empty_array", f"Invalid '{param}': empty array. {wanted}"
    return "array_below_min_length", f"Invalid '{param}': array too short. Expected at least {minimum} items."


def _too_long(error: Any, param: str) -> Described:
    if isinstance(error.get("input"), str):
        return _text_too_long(error, param)
    maximum, given = error["ctx"]["max_length"], error.get("input")
    if isinstance(given, dict):
        wanted = f"Expected an object with at most {maximum} properties, but got an object with {len(given)} properties instead."
        return "object_above_max_properties", f"Invalid '{param}': too many properties. {wanted}"
    wanted = f"Expected an array with maximum length {maximum}"
    got = f", but got an array with length {len(given)} instead" if isinstance(given, list) else ""
    return "array_above_max_length", f"Invalid '{param}': array too long. {wanted}{got}."


def _text_too_long(error: Any, param: str) -> Described:
    return "string_above_max_length", f"Invalid '{param}': string too long. Expected at most {error['ctx']['max_length']} characters."


def _text_too_short(error: Any, param: str) -> Described:
    return "string_below_min_length", f"Invalid '{param}': string too short. Expected at least {error['ctx']['min_length']} characters."


def _bound(side: str, relation: str, limit: str) -> Callable[[Any, str], Described]:
    def describe(error: Any, param: str) -> Described:
        bound = error["ctx"][limit]
        number = "integer" if isinstance(bound, int) else "decimal"
        wanted = f"Expected a value {relation} {bound}."
        return f"{number}_{side}_value", f"Invalid '{param}': {number} {side.replace('_', ' ')} value. {wanted}"

    return describe


_DESCRIBERS: Final[Mapping[str, Callable[[Any, str], Described]]] = {
    _MISSING: _missing,
    "union_tag_not_found": _missing,
    _UNKNOWN: _unknown,
    "too_short": _too_short,
    "too_long": _too_long,
    "string_too_long": _text_too_long,
    "string_too_short": _text_too_short,
    "greater_than": _bound("below_min", "greater than", "gt"),
    "greater_than_equal": _bound("below_min", "of at least", "ge"),
    "less_than": _bound("above_max", "less than", "lt"),
    "less_than_equal": _bound("above_max", "of at most", "le"),
}
