"""`Idempotency-Key` on every POST: where ids do not already make a repeat harmless, the answer is kept and given again."""

from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tessera.contracts import body_digest
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.repeats import Given, answered
from tessera.gateway.ports import Repeat
from tessera.gateway.routes.context import required_scope, rooms_of

Handle = Callable[[Request], Coroutine[Any, Any, Response]]

HEADER: Final = "Idempotency-Key"
REPLAYED: Final = "idempotent-replayed"
_MAXIMUM_CHARACTERS: Final = 255
IDEMPOTENCY_KEY: Final[dict[str, Any]] = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "The same key and body again within a day: done once, and this answer again.",
    "schema": {"type": "string", "minLength": 1, "maxLength": _MAXIMUM_CHARACTERS},
}
_SHOWN_ONCE: Final = frozenset({"/v1/keys", "/v1/keys/{key_id}/rotate"})
"""Their answers hold a secret, which is kept nowhere."""


def keeps_answers(route: APIRoute) -> bool:
    """Whether a repeat is answered from what was kept; other POSTs that take the header make it harmless by their ids."""
    takes = any(parameter.alias == HEADER for parameter in route.dependant.header_params)
    return "POST" in (route.methods or ()) and not takes and required_scope(route) is not None


async def once(request: Request, path_format: str, handle: Handle) -> Response:
    """The answer of `handle`, or the one that was given before under the same Idempotency-Key.

    Raises ApiError 400 for a key that cannot be one, 401, 409, and what `handle` raises.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return await handle(request)
    if not 1 <= len(key) <= _MAXIMUM_CHARACTERS:
        raise ApiError(400, "invalid_value", f"Invalid '{HEADER}': expected 1 to {_MAXIMUM_CHARACTERS} characters.", param=HEADER)
    rooms = rooms_of(request)
    try:
        principal = await rooms.authenticator.principal(request.headers.get("authorization"))
    except ApiError:
        return await handle(request)  # which refuses it, and puts that on record
    if required_scope(request.scope["route"]) not in principal.scopes:
        return await handle(request)
    given: list[Response] = []

    async def work() -> Given:
        given.append(await handle(request))
        text = "{}" if path_format in _SHOWN_ONCE else bytes(given[0].body).decode()
        return given[0].status_code, text

    repeat = Repeat(f"{request.method} {request.url.path}", key, body_digest(await request.body()))
    status, text = await answered(rooms.answers, principal.tenant_id, repeat, work, rooms.patience)
    if given:
        return given[0]
    if path_format in _SHOWN_ONCE:
        raise ApiError(
            409, "secret_shown_before", "This was done before under this Idempotency-Key. Its secret was shown then and is kept nowhere."
        )
    return Response(text, status, {REPLAYED: "true"}, "application/json")
