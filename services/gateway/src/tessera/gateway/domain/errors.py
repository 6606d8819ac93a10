"""Every answer of the gateway that is not 2xx.

    TesseraError
    └── ApiError            status, code, param, message, type by status, Retry-After

The wire form is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, always with all four keys.
"""

from datetime import timedelta
from typing import Final

from tessera.contracts.errors import Problem, TesseraError

INVALID_REQUEST: Final = "invalid_request_error"
RATE_LIMITED: Final = "rate_limit_error"
SERVER_ERROR: Final = "server_error"

MISSING_KEY: Final = "missing_api_key"
RETRY_LATER: Final = timedelta(seconds=2)

_STATUS_OF_CODE: Final = {
    "answer_too_large": 502,
    "dependency_unavailable": 503,
    "temporarily_unavailable": 503,
    "model_unavailable": 503,
    "provider_unavailable": 503,
    "provider_timeout": 504,
    "provider_error": 502,
    "generation_interrupted": 502,
    "expired": 504,
    "timed_out": 504,
    "internal_error": 500,
    "fatal_error": 500,
    "rate_limited": 429,
    "event_too_large": 413,
    "stream_expired": 410,
}


class ApiError(TesseraError):
    """An answer other than 2xx.

    `param` names the part of the request that is wrong, in OpenAI's notation (`messages[0].role`); `cause` what there was too much of,
    which the live API gives as the type of a 429.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: timedelta | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.param = param
        self.retry_after = retry_after
        self.cause = cause

    @property
    def type(self) -> str:
        """OpenAI's coarse class of the error."""
        return self.cause or error_type(self.status)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object, all four keys."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def error_type(status: int) -> str:
    """The `type` that goes with a status."""
    if status == 429:
        return RATE_LIMITED
    return SERVER_ERROR if status >= 500 else INVALID_REQUEST


def of_problem(problem: Problem, *, default_status: int = 500) -> ApiError:
    """The answer that tells a client of another service's problem: its own status, else the one its code deserves."""
    status = problem.status or _status_of_code(problem.code, default_status)
    retry_after = RETRY_LATER if status in (429, 503) else None
    return ApiError(status, problem.code, problem.message, param=problem.param, retry_after=retry_after)


def of_error(error: TesseraError) -> ApiError:
    """Any error with a meaning as an answer."""
    return error if isinstance(error, ApiError) else of_problem(Problem.of(error))


def _status_of_code(code: str, default: int) -> int:
    if code.endswith("not_found"):
        return 404
    return _STATUS_OF_CODE.get(code, default)


def unavailable(what: str) -> ApiError:
    """503: `what` cannot be reached now and nothing was done."""
    return ApiError(
        503, "dependency_unavailable", f"{what} cannot be reached at the moment. Nothing was done; try again.", retry_after=RETRY_LATER
    )


def in_doubt() -> ApiError:
    """503: the event log did not confirm in time, so the event may still arrive."""
    message = (
        "The event log did not confirm in time; whether it took the event is not known. Repeat it with the same id or Idempotency-Key."
    )
    return ApiError(503, "dependency_unavailable", message, retry_after=RETRY_LATER)


def timed_out(what: str) -> ApiError:
    """504: the answer did not come within the request's deadline."""
    return ApiError(504, "timed_out", f"{what} did not answer in time.")


def missing_key() -> ApiError:
    """401: no key was sent."""
    return ApiError(401, MISSING_KEY, "You didn't provide an API key. Send it in the header 'Authorization: Bearer YOUR_KEY'.")


def invalid_key() -> ApiError:
    """401: the key opens nothing. Why is not told."""
    return ApiError(401, "invalid_api_key", "Incorrect API key provided. It is malformed, unknown, expired or revoked.")


def missing_scope(scope: str) -> ApiError:
    """403: the key may do other things."""
    return ApiError(403, "missing_scope", f"This API key lacks the scope '{scope}'.")


def model_not_found(model: str) -> ApiError:
    """404: no such model."""
    return ApiError(404, "model_not_found", f"The model `{model}` does not exist or you do not have access to it.")


def wrong_capability(model: str, has: str, needed: str) -> ApiError:
    """400: the model does something else."""
    return ApiError(400, "unsupported_model", f"The model '{model}' offers {has}, not {needed}.", param="model")


def unsupported(param: str, why: str) -> ApiError:
    """400: `param` cannot be honoured."""
    return ApiError(400, "unsupported_parameter", f"Unsupported parameter: '{param}'. {why}", param=param)


def last_event_id_unknown() -> ApiError:
    """400: no frame of this stream has that id."""
    message = "Invalid 'Last-Event-ID': expected the id of an event that this stream has sent."
    return ApiError(400, "last_event_id_unknown", message, param="Last-Event-ID")


def not_found(code: str, what: str) -> ApiError:
    """404: nothing of that name in this tenant."""
    return ApiError(404, code, f"{what} does not exist.")
