"""From whatever goes wrong while a request is served to the error object."""

from collections.abc import Callable, Collection, Mapping
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tessera.contracts.errors import InvalidError, Problem, RetryableError
from tessera.gateway.domain import errors
from tessera.gateway.domain.errors import ApiError, of_problem
from tessera.gateway.domain.frames import encode_json
from tessera.gateway.routes.validation import of_validation
from tessera.resilience import CircuitOpenError, TimedOutError

_CODES: Final = {
    400: "bad_request",
    404: "unknown_url",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
}

_UNFORESEEN: Final = "The server had an error while processing your request. Its x-request-id identifies it in the logs."


def install(app: FastAPI, methods_of: Callable[[str], Collection[str]]) -> None:
    """Every answer that is not 2xx gets the error object; 405 names every method of the path, of whichever route."""

    async def answer_http(request: Request, error: Exception) -> Response:
        answer = await _answer_error(request, error)
        if answer.status_code == 405:
            answer.headers["allow"] = ", ".join(sorted(methods_of(request.url.path)))
        return answer

    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(InvalidError, _answer_error)
    app.add_exception_handler(RetryableError, _answer_error)
    app.add_exception_handler(CircuitOpenError, _answer_error)
    app.add_exception_handler(TimedOutError, _answer_error)
    app.add_exception_handler(Exception, _answer_error)


async def _answer_error(request: Request, error: Exception) -> Response:
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return error_response(as_api_error(error, request), headers)


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The error object with its status, and Retry-After where there is one."""
    extra = dict(headers or {})
    if error.retry_after is not None:
        extra["retry-after"] = str(max(1, round(error.retry_after.total_seconds())))
    if error.status == 409 or (error.status == 429 and error.retry_after is None):
        # The SDKs repeat both by themselves, and no repeat of the same request can succeed.
        extra["x-should-retry"] = "false"
    if error.status == 401:
        # RFC 6750, section 3.1: no error where nothing was presented.
        extra["www-authenticate"] = "Bearer" if error.code == errors.MISSING_KEY else 'Bearer error="invalid_token"'
    return Response(encode_json(error.body()), error.status, extra, "application/json")


def as_api_error(error: Exception, request: Request | None = None) -> ApiError:
    """The answer that an exception deserves. What nobody foresaw is a 500 that tells nothing of the inside."""
    match error:
        case ApiError():
            known = error
        case RequestValidationError():
            known = of_validation(error.errors(), error.body)
        case HTTPException():
            known = _of_http(error, request)
        case InvalidError():
            known = of_problem(Problem.of(error), default_status=400)
        case CircuitOpenError() | RetryableError():
            known = errors.unavailable("A service that this request needs")
        case TimedOutError():
            known = errors.timed_out("A service that this request needs")
        case _:
            known = ApiError(500, "internal_error", _UNFORESEEN)
    return known


def _of_http(error: HTTPException, request: Request | None) -> ApiError:
    code = _CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "internal_error")
    where = f"{request.method} {request.url.path}" if request else "this request"
    supported = "(HINT: Perhaps you meant to use a different HTTP method?)"
    known = {404: f"Invalid URL ({where})", 405: f"Not allowed to {where.replace(' ', ' on ', 1)}. {supported}"}
    message = known.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, code, message)
