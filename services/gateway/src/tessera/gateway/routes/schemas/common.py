"""What every body has in common."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


def examples(*values: dict[str, Any]) -> ConfigDict:
    """Bodies for the OpenAPI document."""
    return ConfigDict(json_schema_extra={"examples": [*values]})


class Body(BaseModel):
    """A request body: an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class View(BaseModel):
    """An answer. Later versions may add fields."""

    model_config = ConfigDict(extra="allow")


Truth = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Wide = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
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
