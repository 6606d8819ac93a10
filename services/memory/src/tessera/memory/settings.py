"""What an operator can set for memory."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from tessera.bus.settings import ServiceSettings


class EmbedderSettings(BaseModel):
    """The embedding model and the patience with it. Times are in seconds."""

    model_config = ConfigDict(extra="forbid")

    query_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Longer than this a question does not wait for its vector: the answer is lexical and says so."""
    breaker_failure_threshold: Annotated[int, Field(ge=1)] = 3
    breaker_reset_seconds: Annotated[float, Field(gt=0)] = 5.0

    @property
    def query_timeout(self) -> timedelta:
        """The longest wait."""
        return timedelta(seconds=self.query_timeout_seconds)


class QueryCacheSettings(BaseModel):
    """Vectors of recent questions in Redis."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    lifetime_seconds: Annotated[int, Field(ge=1, le=86_400)] = 3_600
    breaker_failure_threshold: Annotated[int, Field(ge=1)] = 3
    breaker_reset_seconds: Annotated[float, Field(gt=0)] = 5.0


class IndexingSettings(BaseModel):
    """How index work is taken up."""

    model_config = ConfigDict(extra="forbid")

    lexical_batch: Annotated[int, Field(ge=1, le=500)] = 64
    """Most memories whose words are indexed in one transaction."""
    vector_batch: Annotated[int, Field(ge=1, le=64)] = 16
    """Most memories embedded in one transaction: some 2 s for full chunks on one quiet core, far below the transaction time-out."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """New work is announced by Postgres; polling finds what an announcement missed."""

    @property
    def poll(self) -> timedelta:
        """The pause between two looks."""
        return timedelta(seconds=self.poll_seconds)


class MemorySettings(ServiceSettings, service="memory"):
    """Settings of the service memory: `TESSERA_MEMORY__…`."""

    reloadable: ClassVar[frozenset[str]] = ServiceSettings.reloadable | {"embedder.query_timeout_seconds"}

    embedder: EmbedderSettings = Field(default_factory=EmbedderSettings)
    query_cache: QueryCacheSettings = Field(default_factory=QueryCacheSettings)
    indexing: IndexingSettings = Field(default_factory=IndexingSettings)
