"""The quick part of `make chaos` (docs/reliability.md): a few rows of the matrix, one scene each, on one platform."""

import random
import uuid

import pytest
from chaos.injecting import publish
from chaos.matrix import ROWS, play, play_kills
from chaos.observing import rows
from chaos.world import World

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(420), pytest.mark.xdist_group("platform")]

QUICK = ("postgres_killed", "resets")


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_of_the_matrix(world: World, name: str) -> None:
    (row,) = [row for row in ROWS if row.name == name]
    result = play(row, world, random.Random(world.seed))
    assert result.clean, f"CHAOS_SEED={world.seed}\n" + "\n".join(result.lines)


def test_every_service_killed_again_and_again(world: World) -> None:
    result = play_kills(world, random.Random(world.seed), kills=1, bound_seconds=240)  # `make chaos` measures; here nothing may be wrong
    assert result.clean, f"CHAOS_SEED={world.seed}\n" + "\n".join(result.lines)


def test_the_oracle_sees_what_is_lost_doubled_and_left(world: World) -> None:
    """Everything that it must find is planted once."""
    with world.scene("oracle") as scene:
        findings = scene.settle(60)
        assert findings.clean, str(findings)
        ledger, query = scene.load.ledger, "DELETE FROM retention.memories WHERE memory_id = $1 RETURNING memory_id"
        (told,) = scene.oracle.told("memory.recorded", 1)
        assert rows(world.platform, query, told.data["memory_id"])
        assert len(scene.oracle.findings(ledger).lost) == 1
        publish(world.platform, "memory.recorded", scene.tenant, str(uuid.uuid4()), told.data, kind="tessera.memory.recorded.v1")
        assert scene.oracle.findings(ledger).doubled
        ledger.acknowledged.append("never-sent")
        assert any("never-sent" in line for line in scene.oracle.findings(ledger).lost)
