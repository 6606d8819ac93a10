"""What every body has in common."""

import json
import re
from datetime import datetime
from typing import Annotated, Any, Final

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError


def examples(*values: dict[str, Any]) -> ConfigDict:
    """Bodies for the OpenAPI document."""
    return ConfigDict(json_schema_extra={"examples": [*values]})


class Body(BaseModel):
    """A request body: an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class View(BaseModel):
    """An answer. Later versions may add fields."""

    model_config = ConfigDict(extra="allow")


def written(value: Any) -> Any:
    """Moments are written as RFC 3339 has them: pydantic would also take a number for seconds since 1970."""
    if isinstance(value, datetime) or value is None or (isinstance(value, str) and _RFC3339.fullmatch(value)):
        return value
    raise ValueError(_NO_MOMENT)


def _int64(value: int) -> int:
    """Not by a bound of the field: the OpenAPI document would hold it as a floating-point number, which is one more."""
    if value >= 2**63:
        raise PydanticKnownError("less_than_equal", {"le": 2**63 - 1})
    if value < -(2**63):
        raise PydanticKnownError("greater_than_equal", {"ge": -(2**63)})
    return value


def _check_moment(name: str, value: Any) -> None:
    if isinstance(value, str) and not _RFC3339.fullmatch(value):
        wrong = InitErrorDetails(type=PydanticCustomError("value_error", _NO_MOMENT), loc=(name,), input=value)
        raise ValidationError.from_exception_data("moment", [wrong])


def as_written(kind: Any, *moments: str) -> BeforeValidator:
    """For a class of the contracts in a body: JSON's types are taken for what they are, no `true` for 1 and no "1" for 1.

    Our own bodies say so field by field; the contracts' classes are also read from events, which are older than this. `moments` are the
    fields that hold one: pydantic would take "0.5" for half a second after 1970.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def read(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        for name in moments:
            _check_moment(name, value.get(name) if isinstance(value, dict) else None)
        try:
            return adapter.validate_json(json.dumps(value), strict=True)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    return BeforeValidator(read)


_NO_MOMENT: Final = "expected a moment as RFC 3339 has it, such as 2026-01-31T09:00:00Z"
_RFC3339: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})")
Instant = Annotated[AwareDatetime, BeforeValidator(written)]
Truth = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Wide = Annotated[int, AfterValidator(_int64), Field(strict=True, json_schema_extra={"format": "int64"})]
ModelId = Annotated[str, Field(min_length=1, max_length=128, examples=["local/quote"])]
Object = dict[str, Any]
Tokens = Annotated[list[Annotated[Whole, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=100_000)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="Up to 16 pairs; names of up to 64 characters, values of up to 512."),
]


class ErrorDetail(BaseModel):
    """OpenAI's error object: all four keys are always there."""

    message: Annotated[str, Field(description="For a person.")]
    type: Annotated[str, Field(description="invalid_request_error, rate_limit_error or server_error.")]
    param: Annotated[str | None, Field(description="The part of the request that is wrong, such as messages[0].role.")]
    code: Annotated[str | None, Field(description="Machine-readable and stable.")]


class ErrorBody(BaseModel):
    """Every answer that is not 2xx, and the last event of a stream that failed."""

    error: ErrorDetail
