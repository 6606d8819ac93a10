"""How Tessera says it: consume, publish, dead letters, inbox, outbox, request and reply.

`Bus` is the face; `tessera.bus.service` runs a service, `tessera.bus.settings` holds what an operator can set. The mechanism is in
`docs/delivery.md`.
"""

from tessera.bus import faults
from tessera.bus.bus import Bus, Outgoing
from tessera.bus.consumer import Consumer
from tessera.bus.deadletters import DeadLetter, DeadLetterSummary
from tessera.bus.emitting import Emitter
from tessera.bus.errors import RequestFailedError, StreamExpiredError, TimedOutError
from tessera.bus.events import Origin, Position, Received, Reply
from tessera.bus.letters import LetterFilter, LetterPage
from tessera.bus.requests import Requests
from tessera.bus.tables import Table
from tessera.bus.transaction import BatchTransaction, Transaction

__all__ = [
    "BatchTransaction",
    "Bus",
    "Consumer",
    "DeadLetter",
    "DeadLetterSummary",
    "Emitter",
    "LetterFilter",
    "LetterPage",
    "Origin",
    "Outgoing",
    "Position",
    "Received",
    "Reply",
    "RequestFailedError",
    "Requests",
    "StreamExpiredError",
    "Table",
    "TimedOutError",
    "Transaction",
    "faults",
]
