"""What every request is held to before its own schema: JSON as RFC 8259 has it, and text that can be stored.

Python's parser takes NaN, and its strings hold U+0000 and unpaired surrogates; Kafka, Postgres and JSON do not.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tessera.gateway.domain.errors import ApiError
from tessera.gateway.routes.repeats import keeps_answers, once
from tessera.gateway.routes.validation import parameter

_EXACT: Final = 2**53
_UNSTORABLE: Final = "text must not contain U+0000 or unpaired surrogates"

Step = tuple[str | int, ...]


class CarefulRoute(APIRoute):
    """A route that refuses what no part of the platform could take. Raises ApiError 400 and 415 while a request is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler with the checks in front."""
        handle = super().get_route_handler()

        repeatable = keeps_answers(self)

        async def careful(request: Request) -> Response:
            _check_parameters(request)
            if self.body_field is not None:
                # What FastAPI asks for next: read once, and by our rules.
                request._json = _checked_body(request, await request.body())
            return await (once(request, self.path_format, handle) if repeatable else handle(request))

        return careful


def _check_parameters(request: Request) -> None:
    for name, value in request.path_params.items():
        if not _storable(str(value)):
            raise _unstorable(name)
    for name, value in request.query_params.multi_items():  # names too: the client chooses those of `metadata[…]`
        if not (_storable(name) and _storable(value)):
            raise _unstorable(name.partition("[")[0])


def _checked_body(request: Request, body: bytes) -> Any:
    if not body:
        return None
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (media_type.startswith("application/") and media_type.endswith("+json")):
        raise ApiError(415, "unsupported_media_type", "Send the body as JSON, with the header 'Content-Type: application/json'.")
    value = parsed(body)
    where = _first_unstorable(value)
    if where is not None:
        raise _unstorable(parameter(("body", *where), value, keep_last=True) or "body")
    return value


def parsed(body: bytes) -> Any:
    """The JSON value. Raises ApiError 400 `invalid_json` for what RFC 8259 does not allow or nobody can mean."""
    try:
        return json.loads(body.decode(), parse_constant=_no_such_number, parse_float=_number)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "We could not parse the JSON body of your request.") from None


def _number(literal: str) -> int | float:
    """JSON Schema, and JavaScript, do not tell 7.0 from 7, so neither do we, as far as both are exact."""
    number = float(literal)
    return int(number) if number.is_integer() and abs(number) < _EXACT else number


def _no_such_number(literal: str) -> NoReturn:
    raise ValueError(f"JSON has no {literal}")


def _first_unstorable(root: Any) -> Step | None:
    """Where in a JSON value text stands that cannot be stored; by a stack of its own, since depth is the client's choice."""
    stack: list[tuple[Step, Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str) and not _storable(value):
            return path
        if isinstance(value, dict):
            if not all(map(_storable, value)):
                return path
            stack += [((*path, name), child) for name, child in value.items()]
        elif isinstance(value, list):
            stack += [((*path, index), child) for index, child in enumerate(value) if not isinstance(child, int | float)]
    return None


def _storable(text: str) -> bool:
    if text.isascii():
        return "\x00" not in text
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _unstorable(param: str) -> ApiError:
    return ApiError(400, "invalid_value", f"Invalid '{param}': {_UNSTORABLE}.", param=param)
