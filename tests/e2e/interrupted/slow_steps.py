"""What `test_interruption.py` interrupts: a test and a teardown that each wait until somebody presses Ctrl-C. Not collected otherwise."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.testkit import Stack

_PROGRESS = Path(os.environ["INTERRUPTED_PROGRESS"])
_STAGE = os.environ["INTERRUPTED_STAGE"]


def _wait_for_interrupt(stage: str) -> None:
    if stage == _STAGE:
        (_PROGRESS / stage).touch()
        threading.Event().wait(50)
        pytest.fail("nobody interrupted")


@pytest.fixture
def slow_to_leave(stack: Stack) -> Iterator[Stack]:
    yield stack
    _wait_for_interrupt("teardown")


def test_that_is_interrupted(slow_to_leave: Stack) -> None:
    assert slow_to_leave.kafka_bootstrap_servers
    _wait_for_interrupt("test")
