"""How fresh an answer has to be, and how fresh it was."""

from datetime import timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from tessera.contracts.events import ConsistencyLevel, Freshness, ReadConsistency, SearchStage
from tessera.gateway.domain.consistency import LONGEST_TOKEN, Token, Tokens, merged
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.consistency import Fresh
from tessera.gateway.routes.schemas.common import Body, Real, View

MOST_TOKENS: Final = 16
_WAIT_SECONDS: Final = {"eventual": 0.0, "bounded": 1.0, "read_your_writes": 10.0, "strong": 10.0}
_MARGIN_SECONDS: Final = 1.0
"""Kept of the time that a question may take for the answer's way back."""

TokenText = Annotated[str, Field(min_length=1, max_length=LONGEST_TOKEN)]


def _shape(levels: list[str], *, token: bool, age: bool) -> dict[str, Any]:
    """What goes with these levels, for the OpenAPI document."""
    token_kinds, age_kind = (["string", "array"] if token else "null"), ("number" if age else "null")
    required = [name for name, given in (("token", token), ("max_age_seconds", age)) if given]
    properties = {"level": {"enum": levels}, "token": {"type": token_kinds}, "max_age_seconds": {"type": age_kind}}
    return {"required": required, "properties": properties}


class ConsistencyOptions(Body):
    """What the answer must hold. Without this object: whatever is there."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                _shape(["eventual", "strong"], token=False, age=False),
                _shape(["read_your_writes"], token=True, age=False),
                _shape(["bounded"], token=True, age=False),
                _shape(["bounded"], token=False, age=True),
            ]
        }
    )

    level: Annotated[
        ConsistencyLevel,
        Field(
            description="eventual: whatever is there; bounded: a token, or everything older than max_age_seconds; "
            "read_your_writes: what the tokens stand for; strong: everything that was accepted before."
        ),
    ]
    token: Annotated[
        TokenText | Annotated[list[TokenText], Field(min_length=1, max_length=MOST_TOKENS)] | None,
        Field(description="What writes or earlier answers gave as consistency.token."),
    ] = None
    max_age_seconds: Annotated[Real | None, Field(ge=0, le=86_400)] = None
    until: Annotated[
        SearchStage,
        Field(description="By what it must be found: its words, or also its meaning, for which vectors are made a little later."),
    ] = "words"
    wait_seconds: Annotated[
        Real | None,
        Field(ge=0, le=300, description="Longest wait; 10, for bounded 1, where absent. Never longer than the server waits for answers."),
    ] = None

    def fresh(self, tokens: Tokens, tenant_id: str, patience: timedelta, *, param: str) -> Fresh:
        """What is to be waited for. Raises ApiError 400 for tokens that are not this tenant's, and for what does not fit the level."""
        self._check(param)
        texts = [] if self.token is None else [self.token] if isinstance(self.token, str) else self.token
        token = merged((tokens.read(tenant_id, text, param=f"{param}.token") for text in texts), param=f"{param}.token")
        wait = _WAIT_SECONDS[self.level] if self.wait_seconds is None else self.wait_seconds
        longest = max(0.0, patience.total_seconds() - _MARGIN_SECONDS)
        wanted = ReadConsistency(
            level=self.level, writes=token.writes, ends=token.ends, maximum_age_seconds=self.max_age_seconds, stage=self.until
        )
        return Fresh(wanted, timedelta(seconds=min(wait, longest)))

    def _check(self, param: str) -> None:
        given = {"token": self.token, "max_age_seconds": self.max_age_seconds}
        allowed = {"read_your_writes": {"token"}, "bounded": {"token", "max_age_seconds"}}.get(self.level, set())
        for name, value in given.items():
            if value is not None and name not in allowed:
                raise ApiError(400, "invalid_value", f"The level '{self.level}' takes no '{name}'.", param=f"{param}.{name}")
        if allowed and sum(value is not None for value in given.values()) != 1:
            wanted = " or ".join(f"'{name}'" for name in sorted(allowed, reverse=True))
            raise ApiError(
                400, "missing_required_parameter", f"The level '{self.level}' needs {wanted}, one of them.", param=f"{param}.token"
            )


EVENTUAL: Final = Fresh(ReadConsistency(level="eventual"), timedelta(0))


class WrittenView(View):
    """How to see that a write has arrived: it is admitted after this answer, not before."""

    level: Literal["eventual"] = "eventual"
    token: Annotated[str, Field(description="A read that gives it waits until this write is visible.")]
    status_url: str | None = None


class ReadView(View):
    """How fresh an answer is."""

    level: ConsistencyLevel
    as_of: Annotated[str | None, Field(description="Whatever was applied by then is in the answer.")] = None
    searchable: Annotated[
        SearchStage | None,
        Field(description="By what the tokens' writes, or everything, can be found: words, or vectors (meaning) too; null: not yet."),
    ] = None
    token: Annotated[str | None, Field(description="How far this answer was: a read that gives it is no older.")] = None


def read_view(level: ConsistencyLevel, freshness: Freshness | None, tokens: Tokens, tenant_id: str) -> ReadView:
    """How fresh an answer is, with the token that stands for it."""
    if freshness is None:
        return ReadView(level=level)
    as_of = freshness.model_dump(mode="json")["as_of"]
    token = tokens.issued(tenant_id, Token(ends=freshness.ends))
    return ReadView(level=level, as_of=as_of, searchable=freshness.searchable, token=token)
