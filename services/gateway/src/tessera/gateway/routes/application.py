"""The HTTP application: routes, the error object, the OpenAPI document."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from tessera.gateway.domain.audit import ACTIONS_OF
from tessera.gateway.routes import (
    administration,
    audit,
    dead_letters,
    generations,
    governance,
    memories,
    problems,
    records,
    stored,
    texts,
    usage,
)
from tessera.gateway.routes.context import Rooms, required_scope
from tessera.gateway.routes.cors import Cors
from tessera.gateway.routes.deprecation import DEPRECATED
from tessera.gateway.routes.edge import Edge, EdgeLimits
from tessera.gateway.routes.repeats import IDEMPOTENCY_KEY, keeps_answers
from tessera.gateway.routes.schemas.common import ErrorBody

VERSION: Final = "0.1.0"

_ROUTERS: Final = (
    generations.router,
    records.router,
    usage.router,
    stored.router,
    texts.router,
    memories.router,
    governance.router,
    administration.router,
    dead_letters.router,
    audit.router,
)
_ERROR: Final = {"$ref": "#/components/schemas/ErrorBody"}
_ERRORS: Final = {
    "400": "The request cannot be honoured; `code` and `param` say why.",
    "401": "No valid API key or access token.",
    "403": "It lacks the scope.",
    "404": "No such thing in your tenant.",
    "408": "The body did not arrive in time.",
    "409": "It is there already, or this Idempotency-Key came with another body.",
    "410": "The log no longer holds what this Idempotency-Key stands for.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests.",
    "500": "A fault of the server.",
    "503": "A service that is needed cannot be reached; see Retry-After.",
    "504": "No answer in time.",
}
_GENERATION_ERRORS: Final = {"422": "The model has nothing to answer from yet.", "502": "The model's provider is at fault."}
_PUBLIC_ERRORS: Final = ("500", "503")


def application(rooms: Rooms, limits: EdgeLimits, origins: Collection[str] = ()) -> Cors:
    """The whole HTTP face of the gateway, ready for a server. Browsers may call it from pages of `origins`."""
    return Cors(Edge(api(rooms), limits, rooms.calls), origins)


def api(rooms: Rooms) -> FastAPI:
    """The routes without the edge."""
    app = FastAPI(
        title="Tessera",
        version=VERSION,
        summary="An OpenAI-compatible API over an event log.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.rooms = rooms
    for router in _ROUTERS:
        app.include_router(router)
    problems.install(app, methods_of)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]  # the documented way to change the document
    return app


def api_routes() -> Iterator[APIRoute]:
    """Every route of the public API."""
    for router in _ROUTERS:
        yield from (route for route in router.routes if isinstance(route, APIRoute))


def methods_of(path: str) -> set[str]:
    """What may be done at this path: by the route that names it in full where there is one, else by the first that fits it."""
    fitting = [route for route in api_routes() if route.path_regex.match(path)]
    chosen = next((route.path for route in fitting if route.path == path), fitting[0].path if fitting else None)
    return {method for route in fitting if route.path == chosen for method in route.methods or ()}


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes, separate_input_output_schemas=False
        )
        _describe_errors(document)
        answers = _examples()
        for route in api_routes():
            _describe_route(document, route, answers)
        app.openapi_schema = document
    return app.openapi_schema


def _describe_errors(document: dict[str, Any]) -> None:
    """The error object takes the place of FastAPI's own."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(error.pop("$defs"))
    schemas["ErrorBody"] = error


def _examples() -> dict[str, Any]:
    """What a running platform answered to the examples of docs/api.md, by method and path; long lists are cut."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8"))
    return found


def _describe_route(document: dict[str, Any], route: APIRoute, answers: dict[str, Any]) -> None:
    scope = required_scope(route)
    for method in route.methods or ():
        operation = document["paths"][route.path_format][method.lower()]
        operation["responses"].pop("422", None)
        if example := answers.get(f"{method} {route.path_format}"):
            succeeded = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
            succeeded["content"]["application/json"]["example"] = example
        known = _ERRORS if scope else {status: _ERRORS[status] for status in _PUBLIC_ERRORS}
        if "generation" in route.tags:
            known = {**known, **_GENERATION_ERRORS}
        for status, description in known.items():
            operation["responses"].setdefault(status, {"description": description, "content": {"application/json": {"schema": _ERROR}}})
        if scope:
            operation["x-required-scope"] = scope
        if keeps_answers(route):
            operation.setdefault("parameters", []).append(IDEMPOTENCY_KEY)
        if (method, route.path_format) in DEPRECATED:
            operation["deprecated"] = True
        if actions := ACTIONS_OF.get((method, route.path_format)):
            operation["x-audit-actions"] = list(actions)
