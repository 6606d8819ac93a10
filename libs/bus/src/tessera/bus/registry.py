"""Which handler takes which event, checked against the catalogue when it is registered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.contracts.base import EventData
from tessera.contracts.catalogue import Mode, Topic, TrafficClass, topic_of
from tessera.contracts.events import EventRefused

Handler = Callable[[Any, Any], Awaitable[None]]
"""Takes the event, and a Transaction in the mode transactional, else an Emitter; a batch handler takes events and a BatchTransaction."""
RefusalHandler = Callable[[str, EventRefused, AsyncConnection], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Registration:
    """One handler."""

    event_class: type[EventData]
    mode: Mode
    handler: Handler
    batched: bool = False


class Registry:
    """The handlers of one consumer. Raises ValueError for what contradicts the catalogue."""

    def __init__(self, service: str, traffic_class: TrafficClass) -> None:
        self._service = service
        self._traffic_class = traffic_class
        self._registrations: dict[str, Registration] = {}
        self.on_refused: RefusalHandler | None = None

    def add(self, registration: Registration) -> None:
        """Adds a handler for one event type."""
        event_class = registration.event_class
        consumer = topic_of(event_class).consumer(self._service)
        if consumer is None or consumer.traffic_class != self._traffic_class or consumer.mode != registration.mode:
            said = f"{consumer.traffic_class}, {consumer.mode}" if consumer else "not read"
            raise ValueError(f"{event_class.__name__} is {said} for {self._service}, not {self._traffic_class}, {registration.mode}")
        if event_class.event_type in self._registrations:
            raise ValueError(f"{event_class.__name__} has a handler already")
        self._registrations[event_class.event_type] = registration

    def __getitem__(self, event_type: str) -> Registration:
        return self._registrations[event_type]

    def modes(self) -> dict[type[EventData], Mode]:
        """What is registered, and how."""
        return {registration.event_class: registration.mode for registration in self._registrations.values()}

    def topics(self) -> list[Topic]:
        """The topics to read. Raises ValueError when a type on one of them has no handler: its events would be lost to dead letters."""
        topics = {topic.name: topic for topic in map(topic_of, self._classes())}
        missing = [
            event.__name__ for topic in topics.values() for event in topic.event_types if event.event_type not in self._registrations
        ]
        if missing:
            raise ValueError(f"no handler in {self._service}.{self._traffic_class} for {', '.join(missing)}")
        return list(topics.values())

    def _classes(self) -> Iterable[type[EventData]]:
        return [registration.event_class for registration in self._registrations.values()]
