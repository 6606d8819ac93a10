"""Every row of every service's dependency table has tests that take the real part away and give it back."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tessera.contracts.catalogue import SERVICES

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]

_TOGETHER = "tests/integration/test_dependencies.py"
_KAFKA = f"{_TOGETHER}::test_without_kafka_a_service_lives_is_not_ready_and_recovers_without_a_restart"
_GATEWAY = "services/gateway/tests/integration/test_outage.py"
_GENERATOR = "services/generator/tests/integration"
_VALIDATOR = "services/validator/tests/integration/test_outage.py"
_RETENTION = "services/retention/tests/integration/test_outage.py"
_KILL = "tests/chaos/test_kill.py::test_kafka_killed_between_effect_and_publishing"

TESTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("gateway", "Kafka (required)"): (
        f"{_GATEWAY}::test_without_kafka_nothing_is_accepted_and_afterwards_all_goes_on",
        f"{_GATEWAY}::test_a_stream_that_kafka_leaves_ends_with_an_error_event",
        f"{_GATEWAY}::test_started_without_kafka_it_refuses_with_a_reason_and_serves_once_kafka_is_there",
        f"{_GATEWAY}::test_started_without_kafka_it_spools_unless_its_disk_fails_and_hands_over_once_kafka_is_there",
        _KAFKA,
        "tests/chaos/test_hand_off.py::test_kafka_dies_then_the_gateway_between_the_disk_and_an_answer",
    ),
    ("gateway", "the spool's disk (optional)"): (
        f"{_GATEWAY}::test_started_without_kafka_it_spools_unless_its_disk_fails_and_hands_over_once_kafka_is_there",
        "tests/chaos/test_hand_off.py::test_a_full_disk_is_503_and_what_it_took_arrives",
    ),
    ("gateway", "Postgres (required)"): (f"{_GATEWAY}::test_without_postgres_known_keys_go_on_a_while_and_the_rest_is_503",),
    ("gateway", "Redis (optional)"): (f"{_GATEWAY}::test_without_redis_nobody_is_limited_and_afterwards_use_is_counted_again",),
    ("gateway", "OpenID provider (optional)"): (
        "services/gateway/tests/integration/test_tokens.py::test_without_the_issuer_known_keys_go_on_and_afterwards_new_ones_are_taken",
        "services/gateway/tests/unit/test_issuer.py::test_without_the_issuer_known_keys_go_on_and_others_cannot_be_judged",
        "services/gateway/tests/unit/test_issuer.py::test_started_without_the_issuer_it_is_asked_until_it_answers",
    ),
    ("gateway", "object store (optional)"): (f"{_GATEWAY}::test_without_the_object_store_uploads_are_503_and_the_rest_goes_on",),
    ("gateway", "the service that answers"): (
        f"{_GATEWAY}::test_a_service_that_does_not_answer_is_a_504",
        f"{_TOGETHER}::test_a_frozen_memory_is_a_504_and_ends_sweeps_that_wait_for_it",
    ),
    ("tokenizer", "Kafka"): (_KAFKA, f"{_TOGETHER}::test_after_kafka_was_away_the_gateway_accepts_and_memory_and_tokenizer_take_in"),
    ("tokenizer", "Postgres (optional)"): (
        "services/tokenizer/tests/integration/test_service.py::test_without_postgres_chats_go_on_and_the_rest_is_told_at_once",
        "services/tokenizer/tests/integration/test_service.py::test_postgres_lost_and_found",
    ),
    ("tokenizer", "ranks of the encodings"): ("libs/encodings/tests/test_encodings.py::test_changed_ranks_are_refused",),
    ("generator", "Postgres (own)"): (
        f"{_GENERATOR}/test_outage.py::test_postgres_goes_and_comes_back",
        f"{_GENERATOR}/test_outage.py::test_a_providers_stream_goes_on_while_postgres_is_away",
        f"{_GENERATOR}/test_takeover.py::test_a_provider_that_was_cut_is_not_called_again",
    ),
    ("generator", "Kafka"): (_KAFKA, f"{_TOGETHER}::test_after_kafka_was_away_the_generator_answers"),
    ("generator", "each provider"): (
        f"{_GENERATOR}/test_service.py::test_an_open_breaker_delays_jobs_and_stalls_nobody_else",
        f"{_GENERATOR}/test_provider.py::test_the_breaker_opens_degrades_and_recovers",
        f"{_GENERATOR}/test_provider.py::test_a_passing_failure_is_repeated",
    ),
    ("generator", "`local/ngram`"): (f"{_GENERATOR}/test_outage.py::test_postgres_goes_and_comes_back",),
    ("generator", "`local/quote`"): (f"{_GENERATOR}/test_outage.py::test_postgres_goes_and_comes_back",),
    ("memory", "Postgres (required)"): (
        f"{_TOGETHER}::test_without_its_postgres_memory_is_not_ready_and_ingestion_waits_in_the_log",
        "tests/chaos/test_kill.py::test_postgres_killed_inside_a_transaction",
    ),
    ("memory", "Kafka (required)"): (
        _KAFKA,
        f"{_TOGETHER}::test_after_kafka_was_away_the_gateway_accepts_and_memory_and_tokenizer_take_in",
        _KILL,
    ),
    ("memory", "embedder (in this process)"): (
        "services/memory/tests/integration/test_store.py::test_without_the_embedder_recall_is_lexical_and_says_so",
        "services/memory/tests/integration/test_store.py::test_an_embedder_that_is_too_slow_opens_its_breaker_and_recovers",
        "services/memory/tests/integration/test_store.py::test_vectors_wait_for_the_embedder_and_nothing_is_lost",
    ),
    ("memory", "Redis"): (
        f"{_TOGETHER}::test_without_redis_memory_is_degraded_answers_the_same_and_recovers",
        "services/memory/tests/integration/test_store.py::test_questions_are_cached_and_losing_redis_changes_nothing",
    ),
    ("retention", "Postgres (required)"): (f"{_RETENTION}::test_without_postgres_it_is_not_ready_and_answers_what_waited_once_it_is_back",),
    ("retention", "Kafka (required)"): (_KAFKA, f"{_TOGETHER}::test_after_kafka_was_away_retention_and_the_validator_answer"),
    ("retention", "memory (through Kafka)"): (f"{_TOGETHER}::test_a_frozen_memory_is_a_504_and_ends_sweeps_that_wait_for_it",),
    ("validator", "Postgres (required)"): (f"{_VALIDATOR}::test_without_postgres_it_is_not_ready_and_goes_on_once_it_is_back",),
    ("validator", "Kafka (required)"): (_KAFKA, f"{_TOGETHER}::test_after_kafka_was_away_retention_and_the_validator_answer"),
    ("validator", "object store (optional)"): (f"{_VALIDATOR}::test_without_the_object_store_it_stays_ready_and_validations_wait",),
}
"""(service, first cell of the row) → the tests that open, degrade and recover."""


def _rows(service: str) -> list[str]:
    """The first cells of the table under "## Dependencies"."""
    text = (ROOT / "services" / service / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Dependencies\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    return [cell for cell in cells if cell != "dependency" and not re.fullmatch("-+", cell)]


@pytest.mark.parametrize("service", SERVICES)
def test_the_rows_of_the_table_are_those_that_are_tested(service: str) -> None:
    assert sorted(_rows(service)) == sorted(row for owner, row in TESTS if owner == service)


@pytest.mark.parametrize("node", sorted({node for nodes in TESTS.values() for node in nodes}))
def test_the_named_test_exists(node: str) -> None:
    path, _, name = node.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {found.name for found in tree.body if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_a_service_without_a_table_would_be_found() -> None:
    assert all(_rows(service) for service in SERVICES)
