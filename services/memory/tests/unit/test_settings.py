"""What an operator can set."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import ValidationError

from tessera.memory.adapters.declaration import DECLARATION
from tessera.memory.adapters.minilm import MAX_TOKENS, MODEL_ID
from tessera.memory.settings import IndexingSettings, MemorySettings

pytestmark = pytest.mark.unit

POSTGRES = {"worker_password": "w", "client_password": "c"}


def test_variables_of_the_service_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_MEMORY__QUERY_CACHE__ENABLED", "false")
    monkeypatch.setenv("TESSERA_MEMORY__INDEXING__POLL_SECONDS", "0.5")

    settings = MemorySettings.model_validate({"postgres": POSTGRES})

    assert settings.query_cache.enabled is False
    assert settings.indexing.poll == timedelta(seconds=0.5)


def test_a_typo_and_a_batch_beyond_the_transaction_time_out_are_refused() -> None:
    for wrong in ({"vector_batches": 3}, {"vector_batch": 65}):
        with pytest.raises(ValidationError):
            IndexingSettings.model_validate(wrong)


def test_the_declared_model_is_the_one_that_runs() -> None:
    assert DECLARATION.model.model_id == MODEL_ID
    assert DECLARATION.model.context_tokens == MAX_TOKENS
