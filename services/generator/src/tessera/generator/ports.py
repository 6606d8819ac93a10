"""What handlers and workers need from the world."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol

from tessera.bus import Origin, Transaction
from tessera.contracts import GenerationCompleted, GenerationFailed, GenerationReady
from tessera.generator.domain.kneser_ney import Discounts, Distribution, Followers, Ngram
from tessera.generator.domain.pieces import Piece
from tessera.generator.domain.transcript import Chunk, Progress

Admission = Literal["added", "known", "cancelled_before"]
LeaseState = Literal["held", "cancelled", "lost"]


@dataclass(frozen=True)
class NewJob:
    """A generation that is to run."""

    ready: GenerationReady
    provider: str
    origin: Origin
    deadline: datetime


@dataclass(frozen=True)
class Job:
    """One attempt at a generation, leased to this worker; `attempt` is the fencing token of every write."""

    tenant_id: str
    generation_id: str
    ready: GenerationReady
    origin: Origin
    deadline: datetime
    attempt: int
    progress: Progress


@dataclass(frozen=True)
class EndedJob:
    """A job that will not run any more, leased to this worker so that it can say so."""

    job: Job
    reason: Literal["cancelled", "expired", "abandoned"]


@dataclass(frozen=True)
class TokenizedText:
    """A text to learn from."""

    tenant_id: str
    subject_id: str | None
    memory_id: str
    encoding: str
    tokens: Sequence[int]
    composition_id: str


class JobIntake(Protocol):
    """Job rows within the transaction of the event being handled."""

    async def add(self, job: NewJob) -> Admission:
        """Adds the job; a known id is left as it is. Workers wake when the transaction commits."""

    async def cancel(self, tenant_id: str, generation_id: str, reason: str) -> None:
        """Asks for the job to stop; an unknown id leaves a row that a late request will find."""

    async def fail(self, ready: GenerationReady, failure: GenerationFailed) -> None:
        """Ends the request being handled when the transaction commits."""


class NgramLearner(Protocol):
    """The n-gram tables within the transaction of the event being handled."""

    async def learn(self, text: TokenizedText) -> bool:
        """Learns the text once; False if it was learned before."""


class NgramModel(Protocol):
    """One tenant's n-gram tables as they were at one moment."""

    @property
    def unigrams(self) -> Distribution:
        """The distribution without context; an empty vocabulary where nothing was learned."""

    def discounts(self, order: int) -> Discounts:
        """The discounts of n-grams of `order` tokens."""

    async def followers(self, contexts: Sequence[Ngram]) -> Mapping[Ngram, Followers]:
        """What followed each context; contexts never seen are absent. Raises RetryableError."""


class NgramReader(Protocol):
    """Opens n-gram tables."""

    def snapshot(self, tenant_id: str, encoding: str) -> AbstractAsyncContextManager[NgramModel]:
        """A consistent view until the block ends. Raises RetryableError."""


@dataclass(frozen=True, slots=True)
class TenantShares:
    """How many jobs of one engine a tenant may have running in this process, and how many each has now."""

    limit: int
    running: Mapping[str, int]


class JobStore(Protocol):
    """Job rows as workers see them. Everything raises RetryableError while the store cannot be used."""

    async def claim(self, provider: str, limit: int, lease: timedelta, shares: TenantShares | None = None) -> Sequence[Job]:
        """Leases up to `limit` jobs that are due for a provider. Never waits for other workers.

        Tenants with fewer running jobs come first, then those that were served longest ago; none gets more than its share.
        """

    async def claim_ended(self, limit: int, lease: timedelta) -> Sequence[EndedJob]:
        """Leases jobs that nobody runs and that were cancelled, are past their deadline or lost too many workers."""

    async def renew(self, job: Job, lease: timedelta) -> LeaseState:
        """Prolongs the lease."""

    async def record(self, job: Job, progress: Progress) -> None:
        """Stores what is about to be sent. Raises LeaseLostError."""

    async def postpone(self, job: Job, delay: timedelta) -> None:
        """Gives the job back, to be run after `delay`. A job that is no longer ours is left alone."""

    async def finish(self, job: Job, event: GenerationCompleted | GenerationFailed) -> None:
        """Ends the job and publishes the event, both or neither. Raises LeaseLostError."""

    async def purge(self, finished_before: timedelta) -> int:
        """Deletes rows of jobs that ended longer ago; returns how many."""


class ChunkSink(Protocol):
    """Where chunks go, past the outbox."""

    async def send(self, job: Job, chunk: Chunk) -> None:
        """Sends a chunk to the asker's partition and waits for the broker's acknowledgement. Raises RetryableError."""


class TokenCounter(Protocol):
    """Counts tokens under a declared encoding."""

    async def count(self, encoding_name: str, text: str) -> int:
        """The number of tokens; long texts do not block the loop."""


class Engine(Protocol):
    """Something that can run a generation."""

    @property
    def name(self) -> str:
        """The provider's name in model declarations."""

    @property
    def concurrency(self) -> int:
        """How many generations it runs at once in this process."""

    @property
    def deterministic(self) -> bool:
        """The same job gives the same pieces again, so another worker may resume it."""

    @property
    def shows_memories(self) -> bool:
        """Recalled memories are put before the prompt, so that the model reads them as tokens."""

    @property
    def suspended(self) -> timedelta:
        """How long its jobs had better wait (its breaker is open); zero when it can be used."""

    def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The pieces of the generation; closing the generator stops the work and closes the connection.

        Raises EngineError (tell the asker), InvalidError, CircuitOpenError (before the first piece: postpone) or RetryableError.
        """


class IntakeOf(Protocol):
    """Makes a JobIntake on a transaction."""

    def __call__(self, transaction: Transaction) -> JobIntake:
        """The port on `transaction`."""


class LearnerOf(Protocol):
    """Makes an NgramLearner on a transaction."""

    def __call__(self, transaction: Transaction) -> NgramLearner:
        """The port on `transaction`."""
