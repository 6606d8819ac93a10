"""Bodies and answers of `/v1/dead-letters`."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tessera.bus import LetterFilter
from tessera.gateway.routes.schemas.common import Body, ErrorDetail, Instant, Truth, View, Whole, examples

LetterId = Annotated[str, Field(min_length=1, max_length=256, examples=["ingest.memory.dlq:0:17"])]
Service = Literal["gateway", "tokenizer", "memory", "generator", "retention", "validator"]
Text = Annotated[str, Field(min_length=1, max_length=2_048)]
Cursor = Annotated[str, Field(min_length=1, max_length=8_192)]


class LetterFilterBody(Body):
    """Which letters are meant; a field that is absent lets all through."""

    topic: Annotated[Text | None, Field(description="Where the event was; `ingest` stands for every tenant's ingestion topic, too.")] = None
    service: Annotated[Service | None, Field(description="Whose consumer refused it.")] = None
    code: Annotated[Text | None, Field(description="The reason, such as `tenant_unknown`.")] = None
    since: Annotated[Instant | None, Field(description="Refused at or after.")] = None
    until: Annotated[Instant | None, Field(description="Refused before.")] = None
    event_id: Annotated[Text | None, Field(description="The event's own id.")] = None
    tenant_id: Annotated[Text | None, Field(description="The topic's owner, or the tenant that the event claims.")] = None

    def wanted(self) -> LetterFilter:
        """The same for the bus."""
        return LetterFilter(**dict(self))


class LettersBody(Body):
    """Which letters to replay or discard: by `ids`, or all pending ones that fit `filter`, `limit` at a time."""

    model_config = examples(
        {"filter": {"code": "tenant_unknown", "tenant_id": "acme"}, "dry_run": True}, {"ids": ["ingest.memory.dlq:0:17"]}
    )

    ids: Annotated[list[LetterId] | None, Field(min_length=1, max_length=500)] = None
    filter: Annotated[LetterFilterBody | None, Field(description="`{}` means every pending letter.")] = None
    limit: Annotated[Whole, Field(ge=1, le=500, description="With a filter: at most so many now.")] = 100
    after: Annotated[Cursor | None, Field(description="With a filter: `next_cursor` of the answer before.")] = None
    dry_run: Annotated[Truth, Field(description="Only say what would happen.")] = False

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give either ids or filter")
        return self


class DeadLetterView(View):
    """A dead letter without its bytes."""

    id: str
    status: Literal["pending", "replayed", "discarded"]
    service: Annotated[str, Field(description="Whose consumer refused it.")]
    topic: Annotated[str | None, Field(description="Where the event was; null where the record does not say so.")]
    partition: int | None
    offset: int | None
    code: str
    message: str
    field: str | None
    error: Annotated[str | None, Field(description="Class of the error.")]
    attempts: int
    replays: Annotated[int, Field(description="How often it had been replayed before it was refused this time.")]
    refused_at: datetime
    tenant_id: Annotated[str | None, Field(description="The topic's owner, else what the event claims.")]
    event_id: str | None
    event_type: str | None
    source: str | None
    request_id: str | None
    trace_id: str | None
    size_bytes: int
    decided_at: datetime | None
    decided_by: Annotated[str | None, Field(description="Id of the operator's key.")]


class DeadLetterPage(View):
    """Some dead letters. A short page is not the last one while it has a cursor."""

    data: list[DeadLetterView]
    has_more: bool
    next_cursor: str | None


class ContentView(View):
    """Bytes as they came, and as what they can be read."""

    base64: str
    text: Annotated[str | None, Field(description="null where it is no UTF-8.")]


class ValueView(ContentView):
    """The event's data."""

    json_value: Annotated[Any, Field(alias="json", description="null where it is no JSON.")]


class HeaderView(ContentView):
    """One header; names may repeat."""

    name: str


class WholeDeadLetterView(DeadLetterView):
    """A dead letter with the original record."""

    key: ContentView | None
    headers: list[HeaderView]
    value: ValueView


class SettledView(View):
    """What became of one letter."""

    id: str
    result: Literal[
        "replayed", "discarded", "would_be_replayed", "would_be_discarded", "already_replayed", "already_discarded", "not_found", "failed"
    ]
    error: ErrorDetail | None


class SettledPage(View):
    """What became of each letter, in the order of the log."""

    dry_run: bool
    counts: Annotated[dict[str, int], Field(description="Letters by result.")]
    data: list[SettledView]
    has_more: bool
    next_cursor: str | None
