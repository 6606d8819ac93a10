"""What a statement costs, through SQLAlchemy and through the driver, in µs: `python tests/bench/bus/statements.py`. One JSON line last."""

import json
import sys
import time
from collections.abc import Awaitable, Callable

import uvloop
from sqlalchemy import text

from tessera.storage import Database, DirectStatement, driver_of
from tessera.testkit import Stack
from tessera.testkit.databases import new_database

REPEATS = 3_000
_SQL = "SELECT next_offset FROM consumer_position WHERE consumer = :consumer AND topic = :topic AND partition = :partition"
_VALUES = {"consumer": "c", "topic": "t", "partition": 1}


async def microseconds(step: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Processor and wall time of one call."""
    for _ in range(REPEATS // 10):
        await step()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(REPEATS):
        await step()
    return {
        "processor": round((time.process_time() - cpu) / REPEATS * 1e6, 1),
        "wall": round((time.perf_counter() - wall) / REPEATS * 1e6, 1),
    }


async def measure(database: Database) -> dict[str, dict[str, float]]:
    """Each way by itself, in µs."""
    through, directly = text(_SQL), DirectStatement(_SQL)

    async def alone() -> None:
        async with database.driver() as driver:
            await directly.rows(driver, _VALUES)

    async def transaction() -> None:
        async with database.transaction() as connection:
            await connection.execute(through, _VALUES)

    figures = {"by itself, through the driver": await microseconds(alone), "a transaction of one": await microseconds(transaction)}
    async with database.transaction() as connection:
        driver = driver_of(connection)
        figures["through SQLAlchemy"] = await microseconds(lambda: connection.execute(through, _VALUES))
        figures["through the driver"] = await microseconds(lambda: directly.rows(driver, _VALUES))
    await database.close()
    return figures


def main() -> None:
    """The whole run."""
    stack = Stack()
    stack.start()
    try:
        made = new_database(stack, ("memory",))
        figures = uvloop.run(measure(Database("memory", made.settings("memory"))))
    finally:
        stack.stop()
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
