"""What the gateway knows from compacted topics."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tessera.contracts.events import ConsumerStatus, ModelDeclared, ModelReference, ServiceStatus
from tessera.gateway.domain.directories import LOST_AFTER, ModelDirectory, StatusDirectory, serving
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.tables import model_declared, service_reported

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 21, tzinfo=UTC)
SERVICES = ("gateway", "tokenizer", "memory", "generator", "retention", "validator")


def declared(model_id: str, available: bool = True, capability: Any = "chat") -> ModelDeclared:
    model = ModelReference(model_id=model_id, provider="p", capability=capability, encoding="e", template="t", exact=True)
    return ModelDeclared(model=model, description="d", owned_by="o", available=available)


def status(service: str, state: Any = "ready", age: timedelta = timedelta(0), instance: str = "1", lag: int = 0) -> ServiceStatus:
    consumers = (ConsumerStatus(name="chat", state="running", partitions=1, lag=lag),)
    return ServiceStatus(
        service=service, instance=instance, state=state, version="1", started_at=NOW, reported_at=NOW - age, consumers=consumers
    )


@pytest.mark.parametrize(
    ("model_id", "capability", "status_code", "code"),
    [("none", "chat", 404, "model_not_found"), ("chat", "embedding", 400, "unsupported_model"), ("gone", "chat", 503, "model_unavailable")],
)
def test_a_model_that_cannot_be_used(model_id: str, capability: Any, status_code: int, code: str) -> None:
    models = ModelDirectory()
    model_declared(models, declared("chat"), NOW)
    model_declared(models, declared("gone"), NOW)
    model_declared(models, declared("gone", available=False), NOW)
    with pytest.raises(ApiError) as refused:
        models.offering(model_id, capability)
    assert (refused.value.status, refused.value.code) == (status_code, code)
    assert list(models.all()) == ["chat"]


def test_a_service_is_as_good_as_its_best_replica() -> None:
    statuses = StatusDirectory()
    for report in (status("memory", "unready", instance="1", lag=2), status("memory", "degraded", instance="2", lag=3)):
        service_reported(statuses, report)
    memory = {service.service: service for service in statuses.overview(NOW)}["memory"]
    assert (memory.state, memory.lag, [replica.state for replica in memory.replicas]) == ("degraded", 5, ["unready", "degraded"])


def test_a_replica_that_is_silent_is_lost_and_one_that_stopped_is_left_out() -> None:
    statuses = StatusDirectory()
    statuses.report(status("memory", age=LOST_AFTER + timedelta(seconds=1), lag=9))
    statuses.report(status("retention", "stopped", age=LOST_AFTER * 2))
    statuses.report(status("validator", age=timedelta(hours=2)))
    found = {service.service: (service.state, service.lag) for service in statuses.overview(NOW)}
    assert found["memory"] == ("lost", 0)
    assert found["retention"] == found["validator"] == found["gateway"] == ("missing", 0)


def test_an_older_report_changes_nothing() -> None:
    statuses = StatusDirectory()
    statuses.report(status("memory"))
    statuses.report(status("memory", "unready", age=timedelta(seconds=5)))
    assert {service.service: service.state for service in statuses.overview(NOW)}["memory"] == "ready"


def test_the_system_serves_when_every_service_does() -> None:
    statuses = StatusDirectory()
    for service in SERVICES[:-1]:
        statuses.report(status(service))
    assert not serving(statuses.overview(NOW))
    statuses.report(status(SERVICES[-1], "degraded"))
    assert serving(statuses.overview(NOW))
