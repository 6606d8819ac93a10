"""The memory service as it is, but for one thing: an event with poison in its text crashes it, never ends, or takes all memory."""

import asyncio
import os
import resource
import signal
from typing import Any

from tessera.memory.app import main
from tessera.memory.handlers import Handlers

_ROOM_BYTES = 256 * 1024 * 1024
_usual = Handlers.message_published


async def _message_published(self: Handlers, event: Any, unit: Any) -> None:
    match str(event.data.content).split():
        case ["POISON", "crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case ["POISON", "hang"]:
            await asyncio.Event().wait()
        case ["POISON", "memory"]:
            _take_all_memory()
    await _usual(self, event, unit)


def _take_all_memory() -> None:
    """Raises MemoryError, for real: the process gets no more than a little above what it has."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        size = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM_BYTES, limits[1]))
    taken = []
    try:
        while True:
            taken.append(bytearray(16 * 1024 * 1024))
    finally:
        taken.clear()
        resource.setrlimit(resource.RLIMIT_AS, limits)


if __name__ == "__main__":
    Handlers.message_published = _message_published  # type: ignore[method-assign]
    main()
