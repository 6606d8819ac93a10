"""The quick part of `make chaos` (docs/reliability.md): a few rows of the matrix, one scene each, on one platform."""

import random
import secrets
from collections.abc import Iterator

import pytest
from chaos.matrix import ROWS, play, play_kills
from chaos.world import World

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

QUICK = ("broker_killed", "postgres_killed", "resets", "zombie")


@pytest.fixture(scope="module")
def world(unmeasured: None) -> Iterator[World]:
    made = World(secrets.randbelow(2**31))
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_of_the_matrix(world: World, name: str) -> None:
    (row,) = [row for row in ROWS if row.name == name]
    result = play(row, world, random.Random(world.seed))
    assert result.clean, f"CHAOS_SEED={world.seed}\n" + "\n".join(result.lines)


def test_every_service_killed_again_and_again(world: World) -> None:
    result = play_kills(world, random.Random(world.seed), kills=2)
    assert result.clean, f"CHAOS_SEED={world.seed}\n" + "\n".join(result.lines)
