"""What the log says about a generation, and what was used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Final, Literal

from tessera.contracts.events import Capability, FinishReason, Usage, UsageSource

Outcome = Literal["completed", "failed", "cancelled"]
Status = Literal["running", "completed", "failed", "cancelled"]
_MILLION: Final = 1_000_000


@dataclass(frozen=True)
class Since:
    """A place in the reply topic before every reply to something."""

    partition: int
    offset: int


@dataclass(frozen=True)
class Ended:
    """How and when a generation ended."""

    outcome: Outcome
    at: datetime
    finish_reason: FinishReason | None = None
    problem: str | None = None
    """As JSON."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage_source: UsageSource | None = None
    cost: Decimal | None = None
    """None where nothing was generated, or the model has no price."""


@dataclass(frozen=True)
class GenerationRecord:
    """One generation as far as it is known."""

    tenant_id: str
    id: str
    model_id: str
    asked_model: str
    provider: str
    capability: Capability
    accepted_at: datetime
    credential_id: str | None = None
    user: str | None = None
    deadline: datetime | None = None
    streamed: bool = False
    include_usage: bool = False
    include_obfuscation: bool = False
    since: Since | None = None
    """None where its request did not say."""
    ended: Ended | None = None

    @property
    def status(self) -> Status:
        """What its asker would call it."""
        return "running" if self.ended is None else self.ended.outcome


@dataclass(frozen=True)
class Price:
    """What a model costs for each million tokens, in the operator's currency."""

    prompt: Decimal
    completion: Decimal

    def of(self, usage: Usage) -> Decimal:
        """The cost of one generation, exactly."""
        return (self.prompt * usage.prompt_tokens + self.completion * usage.completion_tokens) / _MILLION


@dataclass(frozen=True)
class Prices:
    """Prices by the model's id. A model without one has no cost, which is not the same as a cost of 0."""

    models: Mapping[str, Price] = field(default_factory=dict)

    def cost(self, model_id: str, usage: Usage) -> Decimal | None:
        """None where the model has no price."""
        price = self.models.get(model_id)
        return None if price is None else price.of(usage)


@dataclass(frozen=True)
class UsageRow:
    """What one group of generations used; the fields that were not grouped by are None."""

    day: date | None
    credential_id: str | None
    model_id: str | None
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    cost: Decimal
    milliseconds: int
