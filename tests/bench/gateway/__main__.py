"""`make bench-gateway`: Tessera beside LiteLLM, a bare forwarder and the raw path, in one run.

Progress on stderr, one JSON line last on stdout.

    make bench-gateway                    the whole run, about 26 minutes
    make bench-gateway ARGS=--quick       every phase, but so short that its figures mean nothing: to try it

The load is open-loop and comes from outside Python. A figure is *added* to what the provider needs by itself: the percentile of a system
less the median of asking the provider directly. Processor time is that of every process of a system, its servers with it.
"""

import argparse
import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from instruments import Answers, Load, finished, instrument
from measuring import Stopwatch, machine, milliseconds, percentile, print_figures, progress
from systems import Ground, System, floor, forwarder, ground, litellm, litellm_python, tessera

WITH_MEMORY = {"tessera": {"memory": {"limit": 5}}}
USER = {"user": "somebody"}
KNEE_MS = 25.0
GAP_MS = 100.0
TOKENS_PER_SECOND = 20
_FARTHEST = 1.5
"""Times the floor may be slower at the end of the run than at its beginning: beyond, the machine was too busy for the ratios to count."""
_RESIDENT_WINDOW = 10
_TRIES = 2
"""Rates above the first that is too high are tried this often: one pause of the machine must not be taken for the knee."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How long each phase takes."""

    warm_requests: int = 1_500
    warm_rate: float = 50
    rates: Sequence[int] = (10, 20, 50, 100)
    """What is measured of each system, LiteLLM apart. 10, 20 and 50 go into the ratios."""
    point_seconds: float = 15
    """At each rate."""
    idle_seconds: float = 10
    knee_rates: Sequence[int] = (20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 240, 280)
    knee_seconds: float = 10
    streams: Sequence[int] = (100, 200, 300, 400, 500, 600, 700, 800, 900)
    streams_seconds: float = 10
    """While all streams of a level are open."""
    streams_ramp: float = 50
    """Streams begun in a second."""
    error_rate: float = 100
    error_seconds: float = 300
    resident_rate: float = 50
    resident_seconds: float = 600
    resident_first_seconds: float = 60
    litellm_workers: Sequence[int] = (1, 2)
    """Its default, and one per core."""
    litellm_warm_seconds: float = 10


QUICK = Plan(
    warm_requests=20,
    warm_rate=20,
    rates=(10, 20, 50),
    point_seconds=1,
    idle_seconds=1,
    knee_rates=(20,),
    knee_seconds=1,
    streams=(20,),
    streams_seconds=2,
    error_rate=20,
    error_seconds=1,
    resident_rate=10,
    resident_seconds=4,
    resident_first_seconds=2,
    litellm_workers=(1,),
    litellm_warm_seconds=1,
)


@dataclass(frozen=True)
class Direct:
    """Medians of asking the provider itself, in seconds."""

    first: float
    whole: float


@dataclass
class Bench:
    """One run: where, how long, and what the provider needs by itself."""

    at: Ground
    plan: Plan
    direct: Direct = field(default_factory=lambda: Direct(0, 0))

    # --- one measurement --------------------------------------------------------------------------

    def answered(self, system: System, load: Load) -> tuple[Answers, float]:
        """What became of a load, and the processor seconds that the system spent."""
        with Stopwatch(system.pids) as watch:
            answers = finished(load.started(system.url, system.key))
        return answers, watch.cpu

    def point(self, system: System, rate: float, seconds: float | None = None, extra: Figures | None = None) -> Figures:
        """A system at one rate."""
        load = Load(rate, seconds or self.plan.point_seconds, extra={**USER, **(extra or {})})
        answers, cpu = self.answered(system, load)
        figures = self.figures(answers, cpu)
        told = ", ".join(f"{name} {value}" for name, value in figures.items() if name != "requests" and value != {})
        progress(f"  {system.name} at {rate:g}/s: {told}")
        return figures

    def figures(self, answers: Answers, cpu: float) -> Figures:
        """The absolute figures; None for times where nothing was answered."""
        added: Figures = {}
        for name, values, needed in (("added", answers.whole, self.direct.whole), ("added_ttft", answers.first, self.direct.first)):
            for label, share in (("p50", 0.5), ("p99", 0.99)):
                told = round(1000 * (percentile(values, share) - needed), 2) if values else None
                added[f"{name}_{label}_ms"] = told
        good = len(answers.whole)
        return {
            "requests": answers.sent,
            "errors": answers.errors,
            **added,
            "cpu_ms_per_request": round(1000 * cpu / good, 2) if good else None,
        }

    def warm(self, system: System, requests: int, rate: float) -> None:
        """Until its caches are full and its code is compiled; what becomes of these requests does not count."""
        progress(f"warming up {system.name} ({requests} requests)")
        answers, _ = self.answered(system, Load(rate, requests / rate, extra=USER))
        if not answers.first:
            raise RuntimeError(f"{system.name} answers nothing: {answers.errors}")
        if answers.errors:
            progress(f"  errors of {system.name} while it warmed up: {answers.errors}")

    # --- phases -----------------------------------------------------------------------------------

    def measure_direct(self) -> Figures:
        """What the provider and the load need by themselves, and how even a stream is at best."""
        self.answered(self.at.direct, Load(50, 1))
        answers, _ = self.answered(self.at.direct, Load(50, self.plan.point_seconds))
        self.direct = Direct(percentile(answers.first, 0.5), percentile(answers.whole, 0.5))
        streams = self.stream_answers(self.at.direct, max(level for level in self.plan.streams if level <= 500))
        figures = {
            "ttft_p50_ms": milliseconds(answers.first, 0.5),
            "ttft_p99_ms": milliseconds(answers.first, 0.99),
            "p50_ms": milliseconds(answers.whole, 0.5),
            "streams": streams.sent,
            "gap_p99_ms": streams.gap_p99_ms(),
        }
        progress(f"  the provider itself: {figures}")
        return figures

    def measure_forwarder(self) -> Figures:
        """The least that a gateway in Python takes."""
        with forwarder(self.at) as system:
            self.warm(system, 50, 50)
            return {str(rate): self.point(system, rate) for rate in self.plan.rates}

    def measure_floor(self, rates: Sequence[int], *, through_memory: bool = False) -> Figures:
        """The raw path."""
        with floor(self.at, through_memory=through_memory) as system:
            self.warm(system, self.plan.warm_requests, self.plan.warm_rate)
            return {str(rate): self.point(system, rate) for rate in rates}

    def measure_litellm(self) -> tuple[Figures, Figures]:
        """Figures for each number of workers, and what was run."""
        found, about, errors = {}, {}, dict[str, Any]()
        for workers in self.plan.litellm_workers:
            with litellm(self.at, workers) as system:
                about = {**system.about}
                progress(f"LiteLLM {about['version']}, workers {workers}, configuration {about['configuration']}")
                self.warm(system, int(10 * self.plan.litellm_warm_seconds), 10)
                found[str(workers)] = {str(rate): self.point(system, rate) for rate in (10, 20)}
                errors[str(workers)] = {rate: figures["errors"] for rate, figures in found[str(workers)].items()}
        progress(f"LiteLLM's errors by workers and rate: {errors}")
        return found, {**about, "workers": list(self.plan.litellm_workers), "errors": errors}

    def measure_tessera(self) -> Figures:
        """Every phase of Tessera, on one start of it."""
        with tessera(self.at) as system:
            self.warm(system, self.plan.warm_requests, self.plan.warm_rate)
            points = {str(rate): self.point(system, rate) for rate in self.plan.rates}
            progress("with memory")
            recalled = self.point(system, 50, extra=WITH_MEMORY)
            return {
                "points": points,
                "with_memory": recalled,
                **self.idle(system),
                **self.parts(system),
                **self.knee(system),
                **self.stall_free(system),
                **self.error_rate(system),
                **self.resident(system),
            }

    def parts(self, system: System) -> Figures:
        """Which process spends how much on a request, at 50/s."""
        with _watched(system) as watches:
            answers = finished(Load(50, self.plan.point_seconds, extra=USER).started(system.url, system.key))
        spent = {name: round(1000 * watch.cpu / max(1, len(answers.whole)), 2) for name, watch in watches.items()}
        progress(f"  processor ms per request at 50/s: {spent}")
        return {"cpu_ms_by_process": spent}

    def idle(self, system: System) -> Figures:
        """How much of a core each process keeps busy while nothing is asked: at a low rate, a good part of each request's time."""
        with _watched(system) as watches:
            time.sleep(self.plan.idle_seconds)
        cores = {name: round(watch.cpu / watch.wall, 3) for name, watch in watches.items()}
        progress(f"  cores in use while nothing is asked: {cores}")
        return {"idle_cores": round(sum(cores.values()), 3), "idle_cores_by_process": cores}

    def knee(self, system: System) -> Figures:
        """The highest rate whose first tokens are at most KNEE_MS late at the 99th percentile, without an error."""
        progress(f"the highest rate with p99 of at most {KNEE_MS:g} ms")
        found, best, failures = {}, 0, 0
        for rate in self.plan.knee_rates:
            figures = self.point(system, rate, self.plan.knee_seconds)
            found[str(rate)] = figures["added_ttft_p99_ms"]
            good = not figures["errors"] and figures["added_ttft_p99_ms"] <= KNEE_MS
            best, failures = (rate, 0) if good else (best, failures + 1)
            if failures >= _TRIES:
                break
        return {"rps_at_p99_25ms": best, "knee": found}

    def stream_answers(self, system: System, streams: int) -> Answers:
        """So many streams at once. Gaps count while all of them are open."""
        ramp = streams / self.plan.streams_ramp
        length = ramp + 1 + self.plan.streams_seconds
        tokens = round(length * TOKENS_PER_SECOND)
        open_from, open_until = ramp + 0.5, length - 0.5
        load = Load(self.plan.streams_ramp, ramp, "steady", tokens, (open_from, open_until), USER, patience_seconds=length + 30)
        return self.answered(system, load)[0]

    def stall_free(self, system: System) -> Figures:
        """The most streams of 20 tokens a second with gaps of at most GAP_MS at the 99th percentile, without an error."""
        progress(f"the most streams with gaps of at most {GAP_MS:g} ms")
        found, best = {}, 0
        for streams in self.plan.streams:
            answers = self.stream_answers(system, streams)
            found[str(streams)] = {
                "gap_p50_ms": milliseconds(answers.gaps, 0.5) if answers.gaps else None,
                "gap_p99_ms": answers.gap_p99_ms() if answers.gaps else None,
                "errors": answers.errors,
            }
            progress(f"  {streams} streams: {found[str(streams)]}")
            if answers.errors or not answers.gaps or answers.gap_p99_ms() > GAP_MS:
                break
            best = streams
        return {"stall_free_streams": best, "streams": found}

    def error_rate(self, system: System) -> Figures:
        """What is not answered as it should be, at a rate that is held for long."""
        progress(f"{self.plan.error_rate:g}/s for {self.plan.error_seconds:g} s")
        answers, cpu = self.answered(system, Load(self.plan.error_rate, self.plan.error_seconds, extra=USER))
        figures = self.figures(answers, cpu)
        progress(f"  {figures}")
        return {"error_rate": round(answers.error_rate, 5), "held": figures}

    def resident(self, system: System) -> Figures:
        """How much more memory the six services hold at the end of a constant load than after its first minute."""
        progress(f"{self.plan.resident_rate:g}/s for {self.plan.resident_seconds:g} s, for memory")
        began, seen = time.monotonic(), list[tuple[float, float]]()
        with _ended(Load(self.plan.resident_rate, self.plan.resident_seconds, extra=USER).started(system.url, system.key)) as loading:
            while loading.poll() is None and (now := time.monotonic() - began) < self.plan.resident_seconds:
                seen.append((now, system.resident_megabytes()))
                time.sleep(1)
            answers = finished(loading)
        early = _median_until(seen, self.plan.resident_first_seconds)
        late = _median_until(seen, self.plan.resident_seconds)
        progress(f"  {early:.0f} MB, then {late:.0f} MB; errors {answers.errors}")
        return {"rss_growth": round(late / early, 3), "rss_mb": [round(early), round(late)], "rss_errors": answers.errors}


@contextlib.contextmanager
def _watched(system: System) -> Iterator[dict[str, Stopwatch]]:
    """A watch on each process of a system, read when the block has ended."""
    watches = {name: Stopwatch((pid,)) for name, pid in system.processes.items()}
    with contextlib.ExitStack() as watching:
        for watch in watches.values():
            watching.enter_context(watch)
        yield watches


@contextlib.contextmanager
def _ended(loading: Any) -> Iterator[Any]:
    """Ends a load with the block, whatever happens in it."""
    try:
        yield loading
    finally:
        if loading.poll() is None:
            loading.send_signal(signal.SIGTERM)
            loading.wait(10)


def _median_until(seen: Sequence[tuple[float, float]], moment: float) -> float:
    """Of the last values before a moment: one alone may fall into a peak."""
    return statistics.median([value for at, value in seen if at <= moment][-_RESIDENT_WINDOW:])


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Rounded; None where one of them could not be measured, or is not above nothing."""
    return round(numerator / denominator, 2) if numerator is not None and denominator is not None and denominator > 0 else None


def best(figures: Figures, rate: str, name: str) -> float | None:
    """The lowest figure of any number of workers: LiteLLM is held to what suits it best."""
    told = [of_workers[rate][name] for of_workers in figures.values() if of_workers[rate][name] is not None]
    return min(told) if told else None


def run(bench: Bench) -> Figures:
    """Every phase; the figures of the whole run."""
    progress("the provider itself")
    direct = bench.measure_direct()
    progress("the forwarder")
    forwarded = bench.measure_forwarder()
    progress("the raw path")
    raw, raw_memory = bench.measure_floor(bench.plan.rates), bench.measure_floor((50,), through_memory=True)
    progress("LiteLLM")
    theirs, about = bench.measure_litellm()
    progress("Tessera")
    ours = bench.measure_tessera()
    progress("the raw path once more")
    again = bench.measure_floor((50,))["50"]
    points, drift = ours.pop("points"), ratio(again["added_ttft_p50_ms"], raw["50"]["added_ttft_p50_ms"])
    return {
        "cpu_per_request_vs_litellm": ratio(best(theirs, "20", "cpu_ms_per_request"), points["20"]["cpu_ms_per_request"]),
        "ttft_p50_vs_litellm": ratio(best(theirs, "20", "added_ttft_p50_ms"), points["20"]["added_ttft_p50_ms"]),
        "ttft_p50_vs_litellm_at_10": ratio(best(theirs, "10", "added_ttft_p50_ms"), points["10"]["added_ttft_p50_ms"]),
        "ttft_p50_vs_floor": ratio(points["50"]["added_ttft_p50_ms"], raw["50"]["added_ttft_p50_ms"]),
        "ttft_p99_vs_floor": ratio(points["50"]["added_ttft_p99_ms"], raw["50"]["added_ttft_p99_ms"]),
        "ttft_p50_vs_floor_with_memory": ratio(ours["with_memory"]["added_ttft_p50_ms"], raw_memory["50"]["added_ttft_p50_ms"]),
        **ours,
        "systems": {"tessera": points, "litellm": theirs, "forwarder": forwarded, "floor": raw, "floor_with_memory": raw_memory},
        "direct": direct,
        "litellm": about,
        "floor_again": again,
        "floor_drift": drift,
        "valid": drift is not None and 1 / _FARTHEST <= drift <= _FARTHEST,
    }


def main() -> None:
    """The whole run, or with `--quick` a short one."""
    arguments = argparse.ArgumentParser(prog="make bench-gateway")
    arguments.add_argument("--quick", action="store_true", help="so short that the figures mean nothing")
    quick = arguments.parse_args().quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load_before = machine()
    instrument()
    litellm_python()
    with ground() as at:
        figures = run(Bench(at, QUICK if quick else Plan()))
    print_figures({**figures, "quick": quick, "machine": {**load_before, "load_after": machine()["load"]}})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; everything that was started has ended")
