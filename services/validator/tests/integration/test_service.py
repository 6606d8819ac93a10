"""The service as a process of its own: datasets in, verdicts out, over Kafka."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from tessera.contracts.events import DatasetReference, RequestFailed, ValidationCompleted, ValidationInspected, ValidationReported

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("service")]

REPLY_PARTITION = 6


async def test_an_unseen_half_is_approved_and_everyone_is_told(wire: Any, wine: Any) -> None:
    reference, candidate = await wire.store(wine[0]), await wire.store(wine[1])
    validation_id = await wire.submit(candidate, reference)
    ended = await wire.ended(validation_id)
    assert (ended.state, ended.report.verdict) == ("completed", "approve")
    assert (ended.report.candidate_rows, ended.report.reference_rows, len(ended.report.columns)) == (89, 89, 13)

    def mine(seen: Any) -> list[Any]:
        return [event for event in seen if event.data["validation_id"] == validation_id]

    [event] = mine(await wire.completed.until(lambda seen: bool(mine(seen))))
    assert ValidationCompleted.model_validate(event.data).report == ended.report
    assert event.attributes["tenantid"] == wire.tenant


async def test_a_collapsed_table_is_rejected_with_reasons(wire: Any, wine: Any) -> None:
    collapsed = np.tile(wine[1][:10], (9, 1))
    ended = await wire.ended(await wire.submit(await wire.store(collapsed), await wire.store(wine[0])))
    assert ended.report.verdict == "reject"
    assert any(reason.startswith("collapse.duplication: ") for reason in ended.report.reasons)


async def test_without_a_reference_a_person_must_look(wire: Any, wine: Any) -> None:
    ended = await wire.ended(await wire.submit(await wire.store(wine[0]), None))
    assert ended.report.verdict == "review"
    assert ended.report.reasons[0].startswith("reference_missing")
    assert (ended.report.candidate_rows, ended.report.evidence) == (89, ())


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        (b"", "csv", "dataset_empty"),
        (b"a,b\n", "csv", "dataset_empty"),
        (b"x,y\n1,2\n", "csv", "no_common_columns"),
        (b"not parquet", "parquet", "dataset_unreadable"),
        (b'{"c0": 1}\n{"c0": ', "jsonl", "dataset_unreadable"),
    ],
)
async def test_bad_data_fails_with_a_code(wire: Any, wine: Any, data: bytes, kind: str, code: str) -> None:
    ended = await wire.ended(await wire.submit(await wire.store_bytes(data, kind), await wire.store(wine[0])))
    assert (ended.state, ended.problem.code, ended.report) == ("failed", code, None)


async def test_a_dataset_that_is_not_there_fails(wire: Any, wine: Any) -> None:
    missing = DatasetReference(
        dataset_id="d", object_key=f"datasets/{wire.tenant}/missing.csv", format="csv", size_bytes=1, sha256="0" * 64
    )
    ended = await wire.ended(await wire.submit(missing, await wire.store(wine[0])))
    assert (ended.state, ended.problem.code) == ("failed", "object_not_found")


async def test_a_dataset_that_changed_since_it_was_named_fails(wire: Any, wine: Any) -> None:
    named = await wire.store(wine[1])
    await wire.objects.put(named.object_key, b"c0\n1\n")
    ended = await wire.ended(await wire.submit(named, await wire.store(wine[0])))
    assert (ended.state, ended.problem.code) == ("failed", "dataset_changed")


async def test_another_tenants_dataset_is_not_opened(wire: Any, wine: Any) -> None:
    foreign = await wire.store(wine[1], tenant="stranger")
    ended = await wire.ended(await wire.submit(foreign, await wire.store(wine[0])))
    assert (ended.state, ended.problem.code) == ("failed", "dataset_not_found")


async def test_another_tenant_does_not_see_the_validation(wire: Any, wine: Any) -> None:
    validation_id = await wire.submit(await wire.store(wine[1]), None)
    asked = ValidationInspected(reply_partition=REPLY_PARTITION, validation_id=validation_id)
    refused = await wire.ask(asked, RequestFailed, validation_id, tenant="stranger")
    assert (refused.problem.code, refused.problem.status) == ("validation_not_found", 404)


async def test_an_id_means_one_validation(wire: Any, wine: Any) -> None:
    first, second = await wire.store(wine[0]), await wire.store(wine[1])
    validation_id = str(uuid4())
    await wire.ask(wire.request(validation_id, first, None), ValidationReported, validation_id)
    ended = await wire.ended(validation_id)
    again = await wire.ask(wire.request(validation_id, first, None), ValidationReported, validation_id)
    refused = await wire.ask(wire.request(validation_id, second, None), RequestFailed, validation_id)
    assert again == ended
    assert refused.problem.code == "validation_id_reused"
