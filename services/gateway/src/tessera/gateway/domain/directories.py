"""What the gateway knows from the compacted topics: models on offer and how every replica is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from tessera.contracts.catalogue import SERVICES
from tessera.contracts.events import Capability, ModelDeclared, ServiceStatus
from tessera.gateway.domain import errors
from tessera.gateway.domain.names import ModelNames

LOST_AFTER: Final = timedelta(seconds=30)
FORGOTTEN_AFTER: Final = timedelta(hours=1)

_RANK: Final = {"ready": 0, "degraded": 1, "starting": 2, "stopping": 3, "unready": 4, "lost": 5, "stopped": 6}
_SERVING: Final = ("ready", "degraded")


def _complete() -> bool:
    return True


@dataclass(frozen=True)
class DeclaredModel:
    """A declaration and when it was made."""

    declaration: ModelDeclared
    declared_at: datetime


class ModelDirectory:
    """Models by id, and by the operator's other names for them. For one event loop.

    Until `is_complete()` (Kafka was not there yet) what is not known may exist all the same: 503 instead of 404.
    """

    def __init__(self) -> None:
        self.is_complete: Callable[[], bool] = _complete
        self.names = ModelNames()
        self._models: dict[str, DeclaredModel] = {}

    def declare(self, declaration: ModelDeclared, declared_at: datetime) -> None:
        """The newest declaration of a model counts."""
        self._models[declaration.model.model_id] = DeclaredModel(declaration, declared_at)

    def all(self) -> dict[str, DeclaredModel]:
        """Every model on offer, by its id and by each alias, sorted. Raises ApiError 503 while the list is not known."""
        if not self.is_complete():
            raise errors.unavailable("The list of models")
        declared = {model.declaration.model.model_id: model for model in self.known()}
        aliases = {name: declared[target] for name, target in self.names.aliases.items() if target in declared}
        return dict(sorted({**aliases, **declared}.items()))

    def known(self) -> list[DeclaredModel]:
        """The models on offer that were heard of so far, by id."""
        return [model for _, model in sorted(self._models.items()) if model.declaration.available]

    def find(self, name: str) -> DeclaredModel:
        """The model of that id, else the one that the name stands for.

        Raises ApiError 404 `model_not_found`, or 503 while the list is not known.
        """
        model = self._models.get(name)
        if model is None and not self.is_complete():
            raise errors.unavailable("The list of models")
        if model is None and (target := self.names.target(name)) is not None:
            model = self._models.get(target)
        if model is None:
            raise errors.model_not_found(name)
        return model

    def offering(self, name: str, capability: Capability) -> DeclaredModel:
        """The model, able to do what is asked. Raises ApiError 404 if unknown, 400 for another capability, 503 while not available."""
        model = self.find(name)
        reference = model.declaration.model
        if reference.capability != capability:
            raise errors.wrong_capability(name, reference.capability, capability)
        if not model.declaration.available:
            raise errors.ApiError(
                503, "model_unavailable", f"The model '{name}' is not available now.", param="model", retry_after=errors.RETRY_LATER
            )
        return model


@dataclass(frozen=True)
class Replica:
    """A replica's last report; `state` is `lost` where it has not reported for LOST_AFTER."""

    status: ServiceStatus
    state: str


@dataclass(frozen=True)
class ServiceOverview:
    """One service: as good as its best replica."""

    service: str
    state: str
    lag: int
    replicas: tuple[Replica, ...]


class StatusDirectory:
    """The last report of every replica. For one event loop.

    Until `is_complete()` a service that nothing was heard of is `unknown`; then it is `missing`.
    """

    def __init__(self) -> None:
        self.is_complete: Callable[[], bool] = _complete
        self._reports: dict[tuple[str, str], ServiceStatus] = {}

    def report(self, status: ServiceStatus) -> None:
        """Takes a report; an older one than known is ignored."""
        key = (status.service, status.instance)
        known = self._reports.get(key)
        if known is None or known.reported_at <= status.reported_at:
            self._reports[key] = status

    def overview(self, now: datetime) -> list[ServiceOverview]:
        """All six services, also those that never reported. Replicas that stopped or were lost long ago are left out."""
        current = [status for status in self._reports.values() if now - status.reported_at < FORGOTTEN_AFTER]
        unheard = "missing" if self.is_complete() else "unknown"
        return [_overview(service, [status for status in current if status.service == service], now, unheard) for service in SERVICES]


def serving(services: Iterable[ServiceOverview]) -> bool:
    """True when each service has a replica that can serve."""
    return all(service.state in _SERVING for service in services)


def _overview(service: str, reports: list[ServiceStatus], now: datetime, unheard: str) -> ServiceOverview:
    replicas = tuple(Replica(status, _state(status, now)) for status in sorted(reports, key=lambda status: status.instance))
    shown = tuple(replica for replica in replicas if replica.state != "stopped")
    lag = sum(consumer.lag for replica in shown if replica.state != "lost" for consumer in replica.status.consumers)
    return ServiceOverview(service, _best(shown, unheard), lag, shown)


def _best(replicas: tuple[Replica, ...], unheard: str) -> str:
    return min((replica.state for replica in replicas), key=_RANK.__getitem__, default=unheard)


def _state(status: ServiceStatus, now: datetime) -> str:
    if status.state != "stopped" and now - status.reported_at > LOST_AFTER:
        return "lost"
    return status.state
