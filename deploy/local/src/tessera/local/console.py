"""What a person at the terminal sees while something takes time."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_WIDTH = 34


def say(text: str = "") -> None:
    """One line, shown at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def step(title: str) -> Iterator[None]:
    """Name a step before it starts and, on the same line, how long it took."""
    sys.stdout.write(f"  {title:<{_WIDTH}}")
    sys.stdout.flush()
    started = time.monotonic()
    try:
        yield
    except BaseException:
        say(" failed")
        raise
    say(f" {time.monotonic() - started:5.1f} s")
