"""What is spooled and not yet in Kafka, and what of it may be sent now: one event of a key at a time, in the order of acceptance."""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from tessera.gateway.domain.spool import AcceptedEvent


class Place(NamedTuple):
    """Where a record lies; places sort by age."""

    segment: str
    offset: int
    length: int


@dataclass(slots=True)
class Waiting:
    """One spooled event, without its content."""

    place: Place
    key: bytes
    tenant_id: str
    event_id: str
    event_type: str
    accepted_at: datetime
    attempts: int = 0
    last_error: str | None = None
    gone: bool = False
    """It waits no more."""
    rests_until: float = float("-inf")
    """Not tried again before: seconds of the clock that `take` is given."""


def waiting_at(place: Place, event: AcceptedEvent) -> Waiting:
    """An event that lies at `place` and waits."""
    return Waiting(place, event.key, event.tenant_id, event.event_id, event.event_type, event.accepted_at)


class Backlog:
    """The spool's index. For one event loop."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Waiting]] = {}
        self._busy: set[bytes] = set()
        self._known: dict[tuple[str, str], int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Waiting]:
        """Everything that waits, oldest place first."""
        return iter(sorted((waiting for queue in self._queues.values() for waiting in queue), key=lambda waiting: waiting.place))

    def holds(self, key: bytes) -> bool:
        """Whether anything of `key` waits: then what comes new must wait behind it."""
        return key in self._queues

    def knows(self, tenant_id: str, event_id: str) -> bool:
        """Whether this tenant's event waits."""
        return (tenant_id, event_id) in self._known

    def add(self, waiting: Waiting) -> None:
        """Behind everything of its key."""
        self._queues.setdefault(waiting.key, deque()).append(waiting)
        identity = (waiting.tenant_id, waiting.event_id)
        self._known[identity] = self._known.get(identity, 0) + 1
        self._count += 1

    def take(self, limit: int, now: float) -> list[Waiting]:
        """The first event of up to `limit` keys of which none is on its way and none rests; they are on their way from now on."""
        taken: list[Waiting] = []
        for key, queue in self._queues.items():
            if len(taken) >= limit:
                break
            if key not in self._busy and queue[0].rests_until <= now:
                taken.append(queue[0])
        self._busy.update(waiting.key for waiting in taken)
        return taken

    def done(self, waiting: Waiting) -> None:
        """It was taken and waits no more: the next of its key may be taken."""
        queue = self._queues[waiting.key]
        if queue[0] is not waiting:
            raise ValueError("only the first event of a key can be done")
        queue.popleft()
        waiting.gone = True
        self._busy.discard(waiting.key)
        if not queue:
            del self._queues[waiting.key]
        self._forget((waiting.tenant_id, waiting.event_id))
        self._count -= 1

    def failed(self, waiting: Waiting, error: str, rests_until: float) -> None:
        """It was taken and stays first of its key."""
        waiting.attempts += 1
        waiting.last_error, waiting.rests_until = error, rests_until
        self._busy.discard(waiting.key)

    def wake(self, event_ids: Collection[str]) -> list[Waiting]:
        """Everything that waits under one of these ids, of whichever tenant; their keys rest no longer."""
        named = [waiting for queue in self._queues.values() for waiting in queue if waiting.event_id in event_ids]
        for waiting in named:
            self._queues[waiting.key][0].rests_until = float("-inf")
        return named

    @property
    def oldest(self) -> datetime | None:
        """When the longest waiting event was accepted."""
        return min((queue[0].accepted_at for queue in self._queues.values()), default=None)

    def _forget(self, identity: tuple[str, str]) -> None:
        left = self._known[identity] - 1
        if left:
            self._known[identity] = left
        else:
            del self._known[identity]
