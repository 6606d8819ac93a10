"""Lives and deaths of services: SIGKILL at every named crash point and at any other time."""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chaos.observing import rows

from tessera.testkit import ServiceProcess, eventually_blocking
from tessera.testkit.platform import Platform

RANDOM = "any time"
_TRANSACTIONAL = (
    "consumed_before_commit",
    "committed_before_offset",
    "offset_committed",
    "relay_read_before_publish",
    "relay_published_before_delete",
)
_STATELESS = ("handled_before_emit", "emitted_before_offset", "offset_committed")
_JOBS = ("job_before_commit", "job_committed")
CRASH_POINTS: dict[str, tuple[str, ...]] = {
    "gateway": ("accepted_before_publish", "published_before_answer"),
    "tokenizer": _STATELESS,
    "memory": (*_TRANSACTIONAL, "handled_before_emit", "emitted_before_offset", "memory_indexed_before_commit"),
    "generator": (*_TRANSACTIONAL, *_JOBS, "generator_chunk_recorded_before_sent", "generator_chunk_sent"),
    "retention": (*_TRANSACTIONAL, *_JOBS, "sweep_planned_before_commit"),
    "validator": (*_TRANSACTIONAL, *_JOBS, "validation_judged_before_commit"),
}
"""What the load of a scene reaches."""
_LONGEST_LIFE_SECONDS = 20.0
_PASSES = {"gateway": (10, 40)}
"""How often a point is passed before the death, at least and at most: a gateway that dies of its first request starves all others."""
_USUAL_PASSES = (1, 3)
_POLL_SECONDS = 0.05
_SPARED_SECONDS = 60.0
_LAST_CHANCE = 2
"""Deaths of an event that is handled alone after which the next one would make it a dead letter, as it should (rules of the log, 14)."""
_SUSPECTS = (
    "SELECT 1 FROM {0}.batch_mark JOIN {0}.consumer_position USING (consumer, topic, partition) "
    "WHERE attempts >= {1} AND last_offset >= next_offset"
)


@dataclass
class Reaper:
    """Starts one service again and again, each time to die: at the points of a shuffled deck in turn, or, where a point is not reached in
    time, by a signal from outside. A thread of its own; `start`, then `join`."""

    platform: Platform
    service: str
    deaths: Sequence[str]
    """What to die of, one after the other."""
    randomness: random.Random
    died: Counter[str] = field(default_factory=Counter)
    _thread: threading.Thread = field(init=False)
    failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name=f"reaper of {self.service}")
        self._thread.start()

    def join(self) -> None:
        """Wait until all deaths are died and the service is up again. Raises what went wrong. Blocks."""
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        process = self.platform.processes[self.service]
        try:
            for point in self.deaths:
                self.died[self._live(process, point)] += 1
        except BaseException as failure:  # noqa: BLE001 - told by join
            self.failure = failure
        finally:
            _restart(process, self.service, "")
            process.wait_ready(90)

    def _live(self, process: ServiceProcess, point: str) -> str:
        """One life; what it died of."""
        self._spare(process)
        passes = self.randomness.randint(*_PASSES.get(self.service, _USUAL_PASSES))
        armed = "" if point == RANDOM else f"{point}:{passes}"
        _restart(process, self.service, armed)
        # A death at any time may come while the service starts, too.
        longest = _LONGEST_LIFE_SECONDS if armed else self.randomness.uniform(0.5, 10)
        deadline = time.monotonic() + longest
        while process.exit_code is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if process.exit_code is None:
            process.kill()
            return RANDOM
        if process.exit_code != -signal.SIGKILL:
            raise AssertionError(f"{self.service} ended by itself with {process.exit_code}")
        return point

    def _spare(self, process: ServiceProcess) -> None:
        """Lets an event pass that has already died twice with the service: a third death would say that the event is poison."""
        if not self._suspects():
            return
        _restart(process, self.service, "")
        eventually_blocking(lambda: not self._suspects(), _SPARED_SECONDS)

    def _suspects(self) -> bool:
        marks = _TRANSACTIONAL[0] in CRASH_POINTS[self.service]
        return marks and bool(rows(self.platform, _SUSPECTS.format(self.service, _LAST_CHANCE)))


def deck(service: str, kills: int, randomness: random.Random) -> list[str]:
    """So many deaths of a service, spread evenly over its crash points and any time, in no two neighbouring places the same."""
    choices = [*CRASH_POINTS[service], RANDOM]
    deaths: list[str] = []
    while len(deaths) < kills:
        randomness.shuffle(choices)
        if deaths and choices[0] == deaths[-1]:
            choices.reverse()
        deaths += choices
    return deaths[:kills]


def _restart(process: ServiceProcess, service: str, point: str) -> None:
    process.stop()
    process.override(**{f"TESSERA_{service.upper()}__CRASH_POINT": point})
    process.start()
