"""What Schemathesis has to know about this platform: what it must not do to it, and what a refusal of valid data may say."""

import os
import re
from typing import Any

import schemathesis

_OF_THE_SCHEMA = re.compile(
    r"missing_required_parameter|unknown_parameter|invalid_type|invalid_json|empty_array|\w+_(above_max|below_min)_\w+"
)
_ENOUGH_TOKENS = 4
_NOT_YET = ("not_up_to_bound", "write_pending")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Other tests use the same services and the same operator's key: commands reach nobody, and that key is neither revoked nor rotated.

    Nor does a text go on for thousands of tokens, where its length is not what is wrong with the request.
    """
    if case.operation.path == "/v1/services/{service}/control" and isinstance(case.body, dict) and "action" in case.body:
        case.body["instance"] = "nobody"
    if case.operation.path.startswith("/v1/keys/{key_id}") and case.path_parameters.get("key_id") == os.environ["SPARED_KEY"]:
        case.path_parameters["key_id"] = "nobody"
    if case.operation.path == "/v1/completions" and isinstance(case.body, dict) and case.body.get("model") == "local/ngram":
        wanted = case.body.get("max_tokens")
        if wanted is None or (isinstance(wanted, int) and wanted > _ENOUGH_TOKENS):
            case.body["max_tokens"] = _ENOUGH_TOKENS


@schemathesis.check
def a_refusal_of_valid_data_is_not_the_schemas(ctx: Any, response: Any, case: Any) -> None:
    """What fits the schema may be refused with 400 for what it means (a model that cannot do it), never for what the schema forgot to say.

    It takes the place of a 400 in `positive_data_acceptance`, whose list of statuses openapi.toml extends.
    """
    if response.status_code != 400 or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    error = response.json()["error"]
    if _OF_THE_SCHEMA.fullmatch(error["code"]):
        raise AssertionError(f"The schema does not say why this is refused: {error}")


@schemathesis.check
def every_refusal_is_the_error_object(ctx: Any, response: Any, case: Any) -> None:
    """Also where the status is not in the document, as 405 is not."""
    if response.status_code < 400 or case.operation.path == "/health":
        return
    try:
        parts = set(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        parts = set()
    if parts != {"message", "type", "param", "code"}:
        raise AssertionError(f"This is not the error object: {response.status_code} {response.text[:300]!r}")


@schemathesis.check
def what_is_unavailable_was_asked_to_be_fresh(ctx: Any, response: Any, case: Any) -> None:
    """503 is an answer only to a read that asks for what memory cannot hold yet; the platform is whole, so any other is a fault.

    It takes the place of a 503 in `not_a_server_error`, whose list of statuses openapi.toml extends.
    """
    if response.status_code == 503 and response.json()["error"]["code"] not in _NOT_YET:
        raise AssertionError("Something cannot be reached, although all of it runs.")
