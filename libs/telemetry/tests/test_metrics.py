import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from tessera.telemetry import metrics

pytestmark = pytest.mark.unit

FORBIDDEN = {"tenant", "tenant_id", "user", "user_id", "subject", "subject_id", "request_id", "key", "id", "text"}
EVERY = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]


@pytest.mark.parametrize("metric", EVERY, ids=lambda metric: metric._name)
def test_every_metric_is_named_explained_and_says_nothing_about_anyone(metric: MetricWrapperBase) -> None:
    assert metric._name.startswith(("tessera_", "gen_ai_"))  # ours, or those of a convention
    assert len(metric._documentation) > 10
    assert not FORBIDDEN & set(metric._labelnames)


def test_there_are_metrics_of_known_kinds_only() -> None:
    assert EVERY
    assert all(isinstance(metric, Counter | Gauge | Histogram) for metric in EVERY)
