"""The parts of `make chaos` that need no platform."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from chaos.killing import CRASH_POINTS, RANDOM, deck
from chaos.matrix import KILL, ROWS, Result
from chaos.report import BEGIN, END, write

from tessera.local.environment import SERVICES
from tessera.testkit.history import Findings

pytestmark = pytest.mark.unit


def test_every_service_dies_at_all_its_points_alike_and_never_twice_in_a_row_of_the_same() -> None:
    assert set(CRASH_POINTS) == set(SERVICES)
    for service, points in CRASH_POINTS.items():
        deaths = deck(service, 100, random.Random(1))
        dealt = Counter(deaths)
        assert set(dealt) == {*points, RANDOM}
        assert max(dealt.values()) - min(dealt.values()) <= 1
        assert all(one != other for one, other in pairwise(deaths))


def test_the_same_seed_deals_the_same_deaths() -> None:
    assert deck("memory", 30, random.Random(7)) == deck("memory", 30, random.Random(7))


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in ROWS]
    assert len({*names, KILL}) == len(names) + 1


def test_the_report_replaces_only_what_it_wrote(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{BEGIN}\nyesterday\n{END}\nafter\n")
    result = Result(ROWS[0].name, events=12, recovery_seconds=3.21)
    result.add(Findings(lost=["e-1 was acknowledged and has no effect"]))
    figures = {"seed": 5, "faults": 1, "events": 12, "kills_per_service": 0}
    write([result], {"versions": "none yet"}, figures, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "yesterday" not in text
    assert "| 12 | 1 | 0 | 0 | 0 | 3.2 s |" in text
    assert "| versions | none yet |" in text
    assert "CHAOS_SEED=5" in text
