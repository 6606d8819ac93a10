"""Whether what was promised came true: a checker of histories, in the spirit of Jepsen's for Kafka, for every test that breaks something.

A history is what producers sent and were promised, and what is found once all is quiet. `check` looks for five anomalies:

- **lost**: acknowledged and neither applied nor refused, or applied and not told to others;
- **doubled**: applied more than once, or told under more than one id, or one id with two contents;
- **reordered**: two events of a key applied, or told for the first time, in another order than they were sent;
- **aborted**: an effect or an outgoing event of something that was refused, never sent, or not applied;
- **stuck**: work that is left although all is quiet (lag, rows of an outbox, marks).

A repeat on the wire is none of them: an outgoing event may stand in the log several times with one id, because readers recognise it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

ANOMALIES: Final = ("lost", "doubled", "reordered", "aborted", "stuck")
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Sent:
    """One event that a producer tried to send."""

    id: str
    key: str
    """Events of one key keep their order; of several keys, none is promised."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One record that a service wrote on account of an applied event, as it stands in the log."""

    id: str
    cause: str
    """The id of the event that was applied."""
    content: object = None
    """Compared where one id stands in the log twice; leave out what tells the time of the run."""


@dataclass(slots=True)
class History:
    """What was promised and what was found."""

    sent: Sequence[Sent] = ()
    """In the order that each key must keep: that of the log where producers themselves repeat or reorder. Repeats may stand in it."""
    acknowledged: Collection[str] = ()
    """Ids that must not be lost. What was sent and not acknowledged may have an effect or none."""
    refused: Collection[str] = ()
    """Ids that producers or operators were told about instead of an effect."""
    effects: Sequence[str] = ()
    """Ids of applied events, one entry per effect found, in the order in which they were committed."""
    outgoing: Sequence[Outgoing] | None = None
    """Records of applied events, the records of one key in the order of the log; None where the service writes none."""
    outgoing_per_effect: int = 1
    """How many events, each with an id of its own, one applied event has others told."""
    unfinished: Sequence[str] = ()
    """What is still to be done, in words."""
    ordered: bool = True
    """False where the catalogue promises no order."""
    effects_ordered: bool = True
    """False where the order of commits within a transaction cannot be read from what is stored: then `outgoing` tells the order."""
    outgoing_ordered: bool = True
    """False where `outgoing` was read from several partitions that share keys, or no order is promised."""


@dataclass(frozen=True, slots=True)
class Findings:
    """The anomalies of one history, each as lines that name the event."""

    lost: Sequence[str] = ()
    doubled: Sequence[str] = ()
    reordered: Sequence[str] = ()
    aborted: Sequence[str] = ()
    stuck: Sequence[str] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not any(self.counts().values())

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {anomaly: len(getattr(self, anomaly)) for anomaly in ANOMALIES}

    def __str__(self) -> str:
        lines = [f"{anomaly}: {line}" for anomaly in ANOMALIES for line in _shortened(getattr(self, anomaly))]
        return "\n".join(lines) or "nothing found"


def check(history: History) -> Findings:
    """Looks for every anomaly. Never raises; takes time linear in the history."""
    return Findings(
        lost=[*_lost_effects(history), *_lost_outgoing(history)],
        doubled=[*_doubled_effects(history), *_doubled_outgoing(history)],
        reordered=[*_reordered_effects(history), *_reordered_outgoing(history)],
        aborted=[*_aborted_effects(history), *_aborted_outgoing(history)],
        stuck=list(history.unfinished),
    )


def assert_clean(history: History) -> None:
    """Raises AssertionError that names what was found."""
    findings = check(history)
    assert findings.clean, str(findings)  # noqa: S101


def _shortened(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        yield f"and {len(lines) - _SHOWN} more"


# --- effects --------------------------------------------------------------------------------------
def _lost_effects(history: History) -> Iterator[str]:
    accounted = {*history.effects, *history.refused}
    return (f"{event} was acknowledged and has no effect" for event in _distinct(history.acknowledged) if event not in accounted)


def _doubled_effects(history: History) -> Iterator[str]:
    return (f"{event} was applied {times} times" for event, times in Counter(history.effects).items() if times > 1)


def _reordered_effects(history: History) -> Iterator[str]:
    return _inversions(history, history.effects, "applied") if history.ordered and history.effects_ordered else iter(())


def _aborted_effects(history: History) -> Iterator[str]:
    known, refused = {event.id for event in history.sent}, set(history.refused)
    for event in _distinct(history.effects):
        if event not in known:
            yield f"{event} was applied and never sent"
        elif event in refused:
            yield f"{event} was refused and applied"


# --- what others were told ------------------------------------------------------------------------
def _ids_by_cause(history: History) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for record in history.outgoing or ():
        found[record.cause].add(record.id)
    return found


def _lost_outgoing(history: History) -> Iterator[str]:
    if history.outgoing is None:
        return
    told = _ids_by_cause(history)
    for event in _distinct(history.effects):
        if len(told.get(event, ())) < history.outgoing_per_effect:
            yield f"{event} was applied, and {len(told.get(event, ()))} of {history.outgoing_per_effect} outgoing events are in the log"


def _doubled_outgoing(history: History) -> Iterator[str]:
    for cause, ids in _ids_by_cause(history).items():
        if len(ids) > history.outgoing_per_effect:
            yield f"{cause} was told under {len(ids)} ids: {', '.join(sorted(ids))}"
    contents: dict[str, object] = {}
    for record in history.outgoing or ():
        if contents.setdefault(record.id, record.content) != record.content:
            yield f"the outgoing event {record.id} has two contents"


def _reordered_outgoing(history: History) -> Iterator[str]:
    if not (history.ordered and history.outgoing_ordered):
        return iter(())
    return _inversions(history, [record.cause for record in history.outgoing or ()], "told")


def _aborted_outgoing(history: History) -> Iterator[str]:
    applied = set(history.effects)
    return (f"{cause} was told to others and not applied" for cause in _ids_by_cause(history) if cause not in applied)


# --- order ----------------------------------------------------------------------------------------
def _inversions(history: History, happened: Iterable[str], verb: str) -> Iterator[str]:
    """Events that happened after a later one of their key, by their first occurrences."""
    keys: dict[str, str] = {}
    for sent in history.sent:
        keys.setdefault(sent.id, sent.key)
    places = {event: place for place, event in enumerate(keys)}
    latest: dict[str, str] = {}
    for event in _distinct(happened):
        if event not in keys:
            continue
        before = latest.get(keys[event])
        if before is not None and places[before] > places[event]:
            yield f"{event} of the key {keys[event]} was {verb} after {before}"
        else:
            latest[keys[event]] = event


def _distinct(events: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(events)
